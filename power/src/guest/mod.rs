//! What runs inside the guest, in this same program: the agent that does what the host asks, a writer that tells the host every
//! acknowledgement, a reader of everything that a node holds, and smaller help.

use std::fs::{File, OpenOptions};
use std::io;
use std::time::Duration;

pub mod agent;
pub mod fill;
pub mod place;
pub mod values;
pub mod write;

/// Which port of the virtio-serial device the agent answers on.
pub const AGENT_PORT: u32 = 1;
/// Which port the writer's acknowledgements go to.
pub const ACKNOWLEDGED_PORT: u32 = 2;
/// The port's file appears a moment after the driver is loaded.
const PORT_POLL_INTERVAL: Duration = Duration::from_millis(20);
const PORT_POLLS_MAX: u32 = 500;

/// Opens a port, once the driver has made its file: `/dev/vportDEVICEpPORT`.
pub fn open_port(port: u32) -> io::Result<File> {
    let ending = format!("p{port}");
    for _ in 0..PORT_POLLS_MAX {
        for entry in std::fs::read_dir("/dev")?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("vport") && name.ends_with(&ending) {
                return OpenOptions::new().read(true).write(true).open(entry.path());
            }
        }
        std::thread::sleep(PORT_POLL_INTERVAL);
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no port {port} in /dev")))
}
