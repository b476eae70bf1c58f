//! The guest's `power place`: where on the disk a byte of a file stands, for a disk that is to have a bad sector there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use crate::error::{During, Failure};

/// `FIBMAP` and `FIGETBSZ` of `<linux/fs.h>`: the number of a file's block on its disk, and the size of a block.
const FIBMAP: libc::Ioctl = 1;
const FIGETBSZ: libc::Ioctl = 2;

/// Flags of `power place`.
#[derive(Debug, clap::Args)]
pub struct PlaceArgs {
    /// The file; its filesystem has the disk to itself
    #[arg(long)]
    file: PathBuf,
    /// Which byte of it
    #[arg(long)]
    offset: u64,
}

fn ask(file: &File, what: libc::Ioctl, number: u64) -> io::Result<u64> {
    let mut number = libc::c_int::try_from(number).map_err(io::Error::other)?;
    // SAFETY: both take a pointer to an int, which outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), what, &raw mut number) } {
        0 => Ok(number as u64),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Prints the byte's offset on the disk.
pub fn place(args: &PlaceArgs) -> Result<(), Failure> {
    let look = || -> io::Result<u64> {
        let file = File::open(&args.file)?;
        let block_bytes = ask(&file, FIGETBSZ, 0)?;
        match ask(&file, FIBMAP, args.offset / block_bytes)? {
            0 => Err(io::Error::other("nothing was written there")),
            block => Ok(block * block_bytes + args.offset % block_bytes),
        }
    };
    println!("{}", look().during(format_args!("find byte {} of {}", args.offset, args.file.display()))?);
    Ok(())
}
