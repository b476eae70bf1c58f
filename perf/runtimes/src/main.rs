//! `runtimes serve` and `runtimes load`, for `perf/compare --rows runtimes`.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use walferry_runtimes::load::{self, Load};
use walferry_runtimes::{batch, epoll, node_ring, tokio_ring};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Runtime {
    Epoll,
    TokioUring,
    Ring,
}

/// One small server on epoll, tokio-uring or the node's own ring, and its load
#[derive(Parser)]
enum Command {
    /// Serve on a free port of 127.0.0.1, which is printed
    Serve {
        /// What carries the sockets
        #[arg(long)]
        on: Runtime,
        /// Write requests to this file before they are answered; without it nothing is kept
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// Send requests and print what was measured as JSON
    Load {
        /// The server
        #[arg(long)]
        server: SocketAddr,
        /// Connections
        #[arg(long, default_value_t = 64)]
        clients: usize,
        /// Requests that a client sends before it waits for replies
        #[arg(long, default_value_t = 1)]
        pipeline: usize,
        /// Seconds to measure, after a tenth of it to warm up
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
        /// Length of each value in bytes
        #[arg(long, default_value_t = 100)]
        value_bytes: usize,
    },
}

fn run(command: Command) -> io::Result<()> {
    match command {
        Command::Serve { on, file } => {
            let file = file.map(|path| batch::create_file(&path)).transpose()?;
            let listener = TcpListener::bind("127.0.0.1:0")?;
            println!("{}", listener.local_addr()?);
            io::stdout().flush()?;
            match on {
                Runtime::Epoll => epoll::serve(listener, file),
                Runtime::TokioUring => tokio_ring::serve(listener, file),
                Runtime::Ring => node_ring::serve(listener, file),
            }
            .map(|never| match never {})
        }
        Command::Load { server, clients, pipeline, seconds, value_bytes } => {
            let measured = Duration::from_secs_f64(seconds);
            let measured =
                load::run(server, &Load { clients, pipeline, value_bytes, warm_up: measured / 10, measured })?;
            let json = serde_json::json!({
                "requests": measured.requests,
                "per_second": measured.per_second,
                "p50_us": measured.latency_us.value_at_quantile(0.5),
                "p99_us": measured.latency_us.value_at_quantile(0.99),
            });
            println!("{json}");
            Ok(())
        }
    }
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("runtimes: {error}");
            ExitCode::FAILURE
        }
    }
}
