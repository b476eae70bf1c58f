//! What truncations cut off: the frames in `DIR/lost/`, printed as those of a log. Called by `log dump --lost`.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use walferry_engine::frame::Frame;
use walferry_engine::log::{LOST_DIR, lost_range};
use walferry_engine::lsn::Lsn;

use super::{DumpArgs, print_frame};
use crate::failure::{Failure, say};

/// The position of the first frame, which the file's name tells.
fn start_of(path: &Path) -> Option<Lsn> {
    lost_range(path.file_name()?.to_str()?).map(|(from, _)| from)
}

/// The files of a data directory in the order of their positions.
fn files(data: &Path) -> Result<Vec<(Lsn, PathBuf)>, Failure> {
    let dir = data.join(LOST_DIR);
    let failed = |error: std::io::Error| Failure::failed(format_args!("{}: {error}", dir.display()));
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        files.extend(start_of(&path).map(|start| (start, path)));
    }
    files.sort();
    Ok(files)
}

/// Prints every file's frames; of them `--from`, `--limit` and `--records` choose as in a log.
pub fn dump(args: &DumpArgs) -> Result<(), Failure> {
    let files = files(&args.data)?;
    if files.is_empty() {
        return say(format_args!("{}: nothing was ever cut off this node's log", args.data.display()));
    }
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut left = args.limit;
    for (start, path) in files {
        let bytes = std::fs::read(&path);
        let bytes = bytes.map_err(|error| Failure::failed(format_args!("{}: {error}", path.display())))?;
        writeln!(out, "{}", path.display())?;
        let mut at = start;
        while left > 0 && ((at - start) as usize) < bytes.len() {
            let frame = Frame::read(&bytes[(at - start) as usize..], at);
            let frame = frame.map_err(|error| Failure::failed(format_args!("{} at {at}: {error}", path.display())))?;
            at = frame.header().end();
            if args.from.is_none_or(|from| at > from) {
                print_frame(&mut out, &frame, args.records)?;
                left -= 1;
            }
        }
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_tells_where_it_begins() {
        let start = |name: &str| start_of(Path::new(name));
        assert_eq!(start("lost/epoch-3-0000000000001000-0000000000003000-0badcafe.frames"), Some(Lsn(0x1000)));
        let alone = "lost/epoch-3-9f21c4aa-0000000000001000-0000000000003000-0badcafe.frames";
        assert_eq!(start(alone), Some(Lsn(0x1000)), "an epoch that was begun without a register");
        for other in ["notes.txt", "epoch-3.frames", "epoch-3-x-y.frames", ".frames"] {
            assert_eq!(start(other), None, "{other}");
        }
    }
}
