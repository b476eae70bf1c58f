//! The guest's root: a cpio archive with busybox, the walferry binary, this program as its agent, the libraries of both, the
//! kernel's modules and an init script. Knows the archive's format (`newc`) and nothing of what is run.
//!
//! Each entry: "070701", thirteen numbers of eight hexadecimal digits, the name with a NUL, the content; name and content padded
//! to four bytes. The entry `TRAILER!!!` ends the archive.

use std::path::{Path, PathBuf};

use crate::error::{During, Failure};
use crate::kernel::tool;

/// What the guest runs first.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs mnt /mnt
mkdir /mnt/data
for group in boot $(sed 's/.*filesystem=//; s/ .*//' /proc/cmdline); do
  for module in $(cat /modules/$group); do insmod /modules/$module || echo \"init: $module is not loaded\"; done
done
ip link set lo up
ulimit -l unlimited
# Not exec: the shell reaps nodes that are killed.
/bin/power agent
";
const DIRECTORY_MODE: u32 = 0o040_755;
const PROGRAM_MODE: u32 = 0o100_755;
const FILE_MODE: u32 = 0o100_644;

/// The archive while it is made.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: Vec<String>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), device of a special file (2), length of the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        fields.iter().for_each(|field| self.bytes.extend_from_slice(format!("{field:08x}").as_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A file and the directories above it; `path` is absolute.
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            if !self.directories.iter().any(|known| known == &path[..end]) {
                self.directories.push(path[..end].to_owned());
                self.entry(&path[..end], DIRECTORY_MODE, &[]);
            }
        }
        self.entry(path, mode, content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).during(format_args!("read {}", path.display()))
}

/// Builds the archive in `dir` and returns its path.
pub fn build(
    dir: &Path,
    busybox: &Path,
    walferry: &Path,
    more: &[PathBuf],
    modules: &[(&str, Vec<PathBuf>)],
) -> Result<PathBuf, Failure> {
    let mut archive = Archive::default();
    archive.file("/init", PROGRAM_MODE, INIT.as_bytes());
    archive.file("/bin/busybox", PROGRAM_MODE, &read(busybox)?);
    let agent = std::env::current_exe().during("find this program")?;
    let mut libraries: Vec<PathBuf> = Vec::new();
    let own = [("walferry", walferry), ("power", &agent)].map(|(name, program)| (format!("/bin/{name}"), program));
    let more = more.iter().map(|program| (program.display().to_string(), program.as_path()));
    for (path, program) in own.into_iter().chain(more) {
        // Line tables are most of a binary, and the guest unpacks it with an emulated processor.
        let stripped = dir.join(Path::new(&path).file_name().expect("a program's name"));
        let (from, to) = (program.display().to_string(), stripped.display().to_string());
        tool("objcopy", &["--strip-debug", &from, &to], dir)?;
        archive.file(&path, PROGRAM_MODE, &read(&stripped)?);
        libraries.extend(libraries_of(&tool("ldd", &[&to], dir)?));
    }
    libraries.sort();
    libraries.dedup();
    for library in libraries {
        archive.file(&library.display().to_string(), PROGRAM_MODE, &read(&library)?);
    }
    for (group, modules) in modules {
        let mut order = String::new();
        for module in modules {
            let name = module.file_name().expect("a module's file").to_string_lossy();
            order.push_str(&format!("{name}\n"));
            archive.file(&format!("/modules/{name}"), FILE_MODE, &read(module)?);
        }
        archive.file(&format!("/modules/{group}"), FILE_MODE, order.as_bytes());
    }
    let path = dir.join("initramfs");
    std::fs::write(&path, archive.finish()).during(format_args!("write {}", path.display()))?;
    Ok(path)
}

/// `ldd` prints `name => /path (address)`, and `/path (address)` for the loader.
fn libraries_of(ldd: &str) -> Vec<PathBuf> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    ldd.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_directories_before_files_and_is_padded() {
        let mut archive = Archive::default();
        archive.file("/lib/x/y", FILE_MODE, b"12345");
        archive.file("/lib/x/z", FILE_MODE, b"");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        let at = |name: &str| text.find(name).unwrap_or_else(|| panic!("no {name} in {text}"));
        assert!(at("lib\0") < at("lib/x\0") && at("lib/x\0") < at("lib/x/y\0") && at("lib/x/z\0") < at("TRAILER!!!"));
        assert_eq!(text.matches("lib/x\0").count(), 1);
        assert!(bytes.len().is_multiple_of(4));
        assert!(text.match_indices("070701").all(|(at, _)| at % 4 == 0));
    }

    #[test]
    fn libraries_are_found_in_what_ldd_prints() {
        let text =
            "\tlinux-vdso.so.1 (0x1)\n\tlibm.so.6 => /lib/libm.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        assert_eq!(libraries_of(text), [PathBuf::from("/lib/libm.so.6"), PathBuf::from("/lib64/ld-linux-x86-64.so.2")]);
    }
}
