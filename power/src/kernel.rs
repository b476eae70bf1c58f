//! The guest's kernel: Debian's, as `apt-get` brings it, unpacked once and kept. Knows which modules the guest needs and in which
//! order they are loaded.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{During, Failure};

/// The package that depends on the current kernel.
const META_PACKAGE: &str = "linux-image-amd64";
/// What the guest needs beyond what is built in; what these depend on comes along. With an emulated processor a filesystem
/// takes seconds to load: every machine loads the first group, and of the others the one that it is for.
const GROUPS: [(&str, &[&str]); 4] = [
    ("boot", &["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "crc32c_generic"]),
    ("ext4", &["ext4"]),
    ("xfs", &["xfs"]),
    // Without modprobe in the guest the kernel finds no cipher by itself: what each suite of a link is made of.
    (
        "tls",
        &["tls", "chacha-x86_64", "poly1305-x86_64", "chacha20poly1305", "aesni-intel", "gcm", "ctr", "ghash-generic"],
    ),
];

/// A kernel to boot.
#[derive(Debug)]
pub struct Kernel {
    /// The compressed image.
    pub image: PathBuf,
    /// Groups of modules, each in the order in which they are loaded after those of the first.
    pub modules: Vec<(&'static str, Vec<PathBuf>)>,
}

/// Runs a tool and returns what it prints.
pub fn tool(program: &str, arguments: &[&str], dir: &Path) -> Result<String, Failure> {
    let what = format!("run `{program} {}`", arguments.join(" "));
    let output = Command::new(program).args(arguments).current_dir(dir).stdin(Stdio::null()).output().during(&what)?;
    if !output.status.success() {
        return Err(Failure::failed(format_args!("cannot {what}: {}", String::from_utf8_lossy(&output.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Kernel {
    /// The one in `dir`; brought there first if there is none.
    pub fn find(dir: &Path) -> Result<Kernel, Failure> {
        let tree = dir.join("kernel");
        if version(&tree).is_none() {
            fetch(dir, &tree)?;
        }
        let version = version(&tree).ok_or_else(|| Failure::failed("the kernel's package holds no vmlinuz"))?;
        let modules = tree.join("lib/modules").join(&version);
        if !modules.join("modules.dep").exists() {
            let base = tree.display().to_string();
            tool("depmod", &["-b", &base, &version], dir)?;
        }
        let text = std::fs::read_to_string(modules.join("modules.dep")).during("read the kernel's modules.dep")?;
        let loaded = load_order(&text, GROUPS[0].1, &[])?;
        let group = |(name, wanted): (&'static str, &[&str])| {
            let known = if name == GROUPS[0].0 { &[][..] } else { &loaded };
            Ok((name, load_order(&text, wanted, known)?.into_iter().map(|path| modules.join(path)).collect()))
        };
        let groups = GROUPS.into_iter().map(group).collect::<Result<_, Failure>>()?;
        Ok(Kernel { image: tree.join("boot").join(format!("vmlinuz-{version}")), modules: groups })
    }
}

fn version(tree: &Path) -> Option<String> {
    let names = std::fs::read_dir(tree.join("boot")).ok()?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    names.filter_map(name).find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
}

fn fetch(dir: &Path, tree: &Path) -> Result<(), Failure> {
    let missing = |failure: Failure| Failure::Missing(failure.to_string());
    let depends = tool("apt-cache", &["depends", META_PACKAGE], dir).map_err(missing)?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let package = package.ok_or_else(|| {
        Failure::Missing(format!(
            "apt knows no {META_PACKAGE}; `apt-get update` may help, or unpack a kernel's package in {}",
            tree.display()
        ))
    })?;
    tool("apt-get", &["download", &format!("linux-image-{package}")], dir).map_err(missing)?;
    let entries = std::fs::read_dir(dir).during(format_args!("list {}", dir.display()))?;
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let file = entries.flatten().map(|entry| entry.path()).find(is_package);
    let file = file.ok_or_else(|| Failure::failed("apt-get downloaded no package"))?;
    tool("dpkg-deb", &["-x", &file.display().to_string(), &tree.display().to_string()], dir)?;
    std::fs::remove_file(&file).during(format_args!("remove {}", file.display()))
}

/// `modules.dep` has a line `path: dependency dependency ...` for each module, the dependencies in reverse order of loading.
/// What is `loaded` already is left out.
fn load_order<'a>(dependencies: &'a str, wanted: &[&str], loaded: &[&str]) -> Result<Vec<&'a str>, Failure> {
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let file = format!("/{name}.ko");
        let line = dependencies.lines().find(|line| line.split(':').next().is_some_and(|path| path.ends_with(&file)));
        let line = line.ok_or_else(|| Failure::failed(format_args!("the kernel has no module {name}")))?;
        let (path, needs) = line.split_once(':').expect("a line of modules.dep");
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.contains(&path) && !loaded.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let text =
            "k/fs/ext4.ko: k/fs/jbd2.ko k/lib/crc16.ko\nk/fs/jbd2.ko:\nk/lib/crc16.ko:\nk/fs/xfs.ko: k/lib/crc16.ko\n";
        let order = load_order(text, &["ext4", "xfs"], &[]).unwrap();
        assert_eq!(order, ["k/lib/crc16.ko", "k/fs/jbd2.ko", "k/fs/ext4.ko", "k/fs/xfs.ko"]);
        assert_eq!(load_order(text, &["xfs"], &["k/lib/crc16.ko"]).unwrap(), ["k/fs/xfs.ko"]);
        assert!(load_order(text, &["btrfs"], &[]).is_err());
    }
}
