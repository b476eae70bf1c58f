//! The guest's first program: runs the shell scripts that the host sends, one after another, and answers with their output.
//!
//! ```text
//! host:  u32 length, script            (little-endian)
//! guest: i32 exit code, u32 length, output
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{AGENT_PORT, open_port};

/// Output beyond this is cut off.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Between two looks whether the host has come.
const HOST_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Serves until the machine is cut off.
pub fn run() -> io::Result<()> {
    let mut port = open_port(AGENT_PORT)?;
    loop {
        let mut length = [0; 4];
        if port.read_exact(&mut length).is_err() {
            // No host at the other end yet.
            std::thread::sleep(HOST_POLL_INTERVAL);
            continue;
        }
        let mut script = vec![0; u32::from_le_bytes(length) as usize];
        port.read_exact(&mut script)?;
        let (code, output) = shell(&script);
        let output = &output[..output.len().min(OUTPUT_BYTES_MAX)];
        port.write_all(&[&code.to_le_bytes()[..], &(output.len() as u32).to_le_bytes(), output].concat())?;
    }
}

fn shell(script: &[u8]) -> (i32, Vec<u8>) {
    let script = String::from_utf8_lossy(script);
    // Into a file: what the script leaves running in the background would keep a pipe open.
    let output = "/tmp/output";
    let run = || -> io::Result<i32> {
        let file = File::create(output)?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Ok(command.status()?.code().unwrap_or(-1))
    };
    match run() {
        Ok(code) => (code, std::fs::read(output).unwrap_or_default()),
        Err(error) => (-1, error.to_string().into_bytes()),
    }
}
