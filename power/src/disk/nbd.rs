//! The part of the NBD protocol that QEMU speaks: one export, simple replies. Reads every request that is there before it answers
//! one, so that what the guest had under way at once is under way at once here. Called by `disk::Disk::serve`; knows no trace.
//!
//! Newstyle negotiation and the request's layout: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>. All
//! numbers are big-endian.

use std::collections::VecDeque;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Content, Disk, Failed, Pending, Request};

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
const HANDSHAKE_FLAGS: u16 = 0b11;
/// HAS_FLAGS | SEND_FLUSH | SEND_FUA
const EXPORT_FLAGS: u16 = 0b1101;
const OPTION_ABORT: u32 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = (1 << 31) | 1;
const INFO_EXPORT: u16 = 0;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_FLAG_FUA: u16 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// The longest option that a client may send.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// The longest read or write; QEMU splits at the same length.
const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Requests that are read ahead of the one that is answered.
const WAITING_MAX: usize = 256;

/// Listens at `socket`; serves one connection after another until the process ends.
pub fn serve(disk: Disk, socket: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    std::thread::Builder::new().name("disk".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // A machine that is cut off in the middle of a request is the point of it all.
            let _ = connection(&disk, stream);
        }
    })?;
    Ok(())
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn number<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn connection(disk: &Disk, mut stream: UnixStream) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(1 << 20, stream.try_clone()?);
    if negotiate(&mut reader, &mut stream, disk.state().image.bytes())? {
        transmit(disk, &mut reader, &mut stream)?;
    }
    Ok(())
}

/// True when the client wants the export.
fn negotiate(reader: &mut impl Read, stream: &mut impl Write, bytes: u64) -> io::Result<bool> {
    stream
        .write_all(&[&MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &HANDSHAKE_FLAGS.to_be_bytes()].concat())?;
    let _client_flags = u32::from_be_bytes(number(reader)?);
    loop {
        if u64::from_be_bytes(number(reader)?) != OPTION_MAGIC {
            return Err(invalid("no NBD option"));
        }
        let option = u32::from_be_bytes(number(reader)?);
        let length = u32::from_be_bytes(number(reader)?);
        if length > OPTION_BYTES_MAX {
            return Err(invalid("an NBD option that is too long"));
        }
        reader.read_exact(&mut vec![0; length as usize])?;
        let mut reply = |kind: u32, data: &[u8]| {
            let head = [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()].concat();
            stream.write_all(&[&head[..], &(data.len() as u32).to_be_bytes(), data].concat())
        };
        match option {
            OPTION_GO => {
                let info = [&INFO_EXPORT.to_be_bytes()[..], &bytes.to_be_bytes(), &EXPORT_FLAGS.to_be_bytes()].concat();
                reply(REPLY_INFO, &info)?;
                reply(REPLY_ACK, &[])?;
                return Ok(true);
            }
            OPTION_ABORT => {
                reply(REPLY_ACK, &[])?;
                return Ok(false);
            }
            _ => reply(REPLY_UNSUPPORTED, &[])?,
        }
    }
}

fn transmit(disk: &Disk, reader: &mut BufReader<UnixStream>, stream: &mut UnixStream) -> io::Result<()> {
    let mut waiting: VecDeque<Pending> = VecDeque::new();
    loop {
        while waiting.len() < WAITING_MAX && (waiting.is_empty() || has_more(reader)?) {
            match receive(disk, reader, stream)? {
                Received::Request(pending) => waiting.push_back(pending),
                Received::Refused => {}
                Received::Disconnect => return Ok(()),
            }
        }
        disk.wait_while_stalled();
        let answer = disk.state().answer_one(&mut waiting);
        match answer {
            Some((cookie, Ok(data))) => reply(stream, cookie, 0, &data)?,
            Some((cookie, Err(Failed))) => reply(stream, cookie, EIO, &[])?,
            None => {}
        }
    }
}

fn has_more(reader: &BufReader<UnixStream>) -> io::Result<bool> {
    if !reader.buffer().is_empty() {
        return Ok(true);
    }
    let mut ready = [PollFd::new(reader.get_ref().as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut ready, PollTimeout::ZERO)? > 0)
}

enum Received {
    Request(Pending),
    Refused,
    Disconnect,
}

fn receive(disk: &Disk, reader: &mut impl Read, stream: &mut impl Write) -> io::Result<Received> {
    if u32::from_be_bytes(number(reader)?) != REQUEST_MAGIC {
        return Err(invalid("no NBD request"));
    }
    let flags = u16::from_be_bytes(number(reader)?);
    let command = u16::from_be_bytes(number(reader)?);
    let cookie = u64::from_be_bytes(number(reader)?);
    let offset = u64::from_be_bytes(number(reader)?);
    let length = u32::from_be_bytes(number(reader)?);
    if length > REQUEST_BYTES_MAX {
        return Err(invalid("an NBD request that is too long"));
    }
    let length = length as usize;
    let request = match command {
        COMMAND_READ => Request::Read { offset, length },
        COMMAND_WRITE => {
            let mut bytes = vec![0; length];
            reader.read_exact(&mut bytes)?;
            Request::Write { offset, content: Content::new(bytes), forced: flags & COMMAND_FLAG_FUA != 0 }
        }
        COMMAND_FLUSH => Request::Flush,
        COMMAND_DISCONNECT => return Ok(Received::Disconnect),
        _ => {
            reply(stream, cookie, EINVAL, &[])?;
            return Ok(Received::Refused);
        }
    };
    let mut state = disk.state();
    if !matches!(request, Request::Flush) && !state.image.holds(offset, length) {
        drop(state);
        reply(stream, cookie, EINVAL, &[])?;
        return Ok(Received::Refused);
    }
    Ok(Received::Request(state.arrive(cookie, request)))
}

fn reply(stream: &mut impl Write, cookie: u64, error: u32, data: &[u8]) -> io::Result<()> {
    let head = [&REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat();
    stream.write_all(&[&head[..], data].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(command: u16, cookie: u64, offset: u64, data: &[u8], length: u32) -> Vec<u8> {
        let head = [&REQUEST_MAGIC.to_be_bytes()[..], &[0, 0], &command.to_be_bytes(), &cookie.to_be_bytes()].concat();
        [&head[..], &offset.to_be_bytes(), &length.to_be_bytes(), data].concat()
    }

    fn answer(stream: &mut UnixStream, data: usize) -> (u32, u64, Vec<u8>) {
        assert_eq!(u32::from_be_bytes(number(stream).unwrap()), REPLY_MAGIC);
        let (error, cookie) =
            (u32::from_be_bytes(number(stream).unwrap()), u64::from_be_bytes(number(stream).unwrap()));
        let mut bytes = vec![0; data];
        stream.read_exact(&mut bytes).unwrap();
        (error, cookie, bytes)
    }

    #[test]
    fn a_client_negotiates_writes_flushes_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("disk");
        let disk = Disk::new(vec![0; 8192], 1);
        disk.state().record();
        disk.serve(&socket).unwrap();
        let mut stream = UnixStream::connect(&socket).unwrap();
        let hello: [u8; 18] = number(&mut stream).unwrap();
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        // Structured replies are not offered, the export is.
        for option in [8, OPTION_GO] {
            let flags: &[u8] = if option == 8 { &[0, 0, 0, 1] } else { &[] };
            stream.write_all(&[flags, b"IHAVEOPT", &option.to_be_bytes(), &[0; 4]].concat()).unwrap();
        }
        let unsupported: [u8; 20] = number(&mut stream).unwrap();
        assert_eq!(unsupported[12..16], REPLY_UNSUPPORTED.to_be_bytes());
        let info: [u8; 20 + 12 + 20] = number(&mut stream).unwrap();
        assert_eq!(info[22..30], 8192_u64.to_be_bytes());

        stream.write_all(&request(COMMAND_WRITE, 1, 512, &[7; 512], 512)).unwrap();
        assert_eq!(answer(&mut stream, 0).0, 0);
        stream.write_all(&request(COMMAND_FLUSH, 2, 0, &[], 0)).unwrap();
        assert_eq!(answer(&mut stream, 0), (0, 2, Vec::new()));
        stream.write_all(&request(COMMAND_READ, 3, 511, &[], 2)).unwrap();
        assert_eq!(answer(&mut stream, 2), (0, 3, vec![0, 7]));
        stream.write_all(&request(COMMAND_READ, 4, 8191, &[], 2)).unwrap();
        assert_eq!(answer(&mut stream, 0).0, EINVAL, "beyond the end");
        stream.write_all(&request(COMMAND_DISCONNECT, 5, 0, &[], 0)).unwrap();
        let trace = disk.state().recorded();
        assert_eq!((trace.writes.len(), trace.flushes.len()), (1, 1));
        assert!(trace.writes[0].answered < Some(trace.flushes[0].arrived));
    }
}
