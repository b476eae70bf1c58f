//! `power ktls`: a leader and its replica over mutual TLS in a guest whose kernel has the module `tls`, which few hosts load. The
//! replica catches up from cold segments, by `sendfile` into a socket whose records the kernel makes, and then follows; the same
//! again with the kernel left out, for comparison. Then, with `--tests`, test binaries of this workspace on that kernel.
//!
//! ```text
//! leader  ── fill, level local ── replica starts ── one commit at remote_flush: caught up ── small and large ones ── stop
//! checks     INFO of the leader, /proc/net/tls_stat of the kernel, `log verify --against` of both logs
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use crate::disk::Disk;
use crate::error::{During, Failure};
use crate::machine::{Bus, Kit, KitArgs, Machine};
use crate::node::{Filesystem, MOUNT};

/// Values that the leader has before there is a replica; more than its log buffer holds.
const COLD: u64 = 64;
const COLD_BYTES: u64 = 1 << 20;
const FLAGS: &str = "--segment-bytes 16MiB --log-buffer-bytes 32MiB --keep-bytes-min 1GiB --store-cache-bytes 8MiB \
                     --waterfall=false --sync 'ANY 1 (*)'";
const LEADER: &str = "127.0.0.1:6400";
const LEADER_PEERS: &str = "127.0.0.1:6401";
/// A node serves, and ends, within so many seconds.
const SECONDS_MAX: u64 = 120;
/// Test binaries may take so long each; the processor is emulated.
const TESTS_TIME_MAX: Duration = Duration::from_secs(3600);

/// Flags of `power ktls`.
#[derive(Debug, Args)]
pub struct KtlsArgs {
    /// Then run these test binaries in the guest; they have to be built beside the binary
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    tests: Vec<PathBuf>,
    /// Run nothing but the test binaries
    #[arg(long, requires = "tests")]
    only_tests: bool,
    #[command(flatten)]
    kit: KitArgs,
}

/// Runs `power ktls`.
pub fn run(args: &KtlsArgs) -> Result<(), Failure> {
    let absolute = |path: &PathBuf| path.canonicalize().during(format_args!("find {}", path.display()));
    let tests = args.tests.iter().map(absolute).collect::<Result<Vec<_>, _>>()?;
    let kit = Kit::prepare(&args.kit, &tests)?;
    if !args.only_tests {
        let (kernel, relay) = (play(&kit, true)?, play(&kit, false)?);
        println!("catching up took {:.2} times as long through the relay as with the kernel's TLS", relay / kernel);
    }
    tests.iter().try_for_each(|test| run_test(&kit, test))
}

fn boot(kit: &Kit) -> Result<Machine, Failure> {
    let disk = Disk::new(Filesystem::Ext4.make(&kit.dir)?, 0);
    let mut machine = Machine::boot(kit, &disk, Filesystem::Ext4, Bus::Virtio, &Default::default())?;
    machine.run(&format!(
        "for module in $(cat /modules/tls); do insmod /modules/$module || exit 1; done\nmount -t ext4 {} {MOUNT}",
        Bus::Virtio.device()
    ))?;
    Ok(machine)
}

/// Starts a node and waits until it serves.
fn start(name: &str, addresses: &str, kernel: bool, more: &str) -> String {
    format!(
        "walferry start --data {MOUNT}/{name} --name {name} {addresses} {FLAGS} --peer-tls --tls-kernel={kernel} \
         --tls-cert /mnt/own.pem --tls-key /mnt/own.key --peer-tls-ca /mnt/ca.pem --ready-file /mnt/{name}.ready {more} \
         >/mnt/{name}.log 2>&1 & echo $! >/mnt/{name}.pid\npower await --file /mnt/{name}.ready --process \
         $(cat /mnt/{name}.pid) --seconds {SECONDS_MAX} || {{ cat /mnt/{name}.log; exit 1; }}"
    )
}

/// Ends a node as an operator does, and waits for it.
fn stop(name: &str) -> String {
    format!(
        "kill $(cat /mnt/{name}.pid); n=0; while kill -0 $(cat /mnt/{name}.pid) 2>/dev/null; do sleep 0.1; n=$((n+1)); \
         [ $n -lt {}0 ] || {{ cat /mnt/{name}.log; exit 1; }}; done",
        SECONDS_MAX
    )
}

fn fill(level: &str, count: u64, bytes: u64) -> String {
    format!("power fill --address {LEADER} --level {level} --count {count} --bytes {bytes}")
}

/// How many seconds the replica took to catch up.
fn play(kit: &Kit, kernel: bool) -> Result<f64, Failure> {
    let how = if kernel { "ktls" } else { "relay" };
    println!("{how}:");
    let mut machine = boot(kit)?;
    let [ca, certificate, key] = certificates()?;
    for (name, text) in [("ca.pem", ca), ("own.pem", certificate), ("own.key", key)] {
        machine.run(&format!("cat >/mnt/{name} <<'END'\n{text}END"))?;
    }
    machine.run("chmod 600 /mnt/own.key")?;
    let leader = format!("--listen {LEADER} --peer-listen {LEADER_PEERS}");
    machine.run(&start("a", &leader, kernel, ""))?;
    machine.run(&fill("local", COLD, COLD_BYTES))?;
    let replica = "--listen 127.0.0.1:6410 --peer-listen 127.0.0.1:6411";
    machine.run(&start("b", replica, kernel, &format!("--follow {LEADER_PEERS}")))?;
    let seconds = machine.run(&fill("remote_flush", 1, 1))?;
    let seconds: f64 = seconds.trim().parse().map_err(Failure::failed)?;
    println!("  caught up with {COLD} MiB: a commit at remote_flush was acknowledged after {seconds:.1} s");
    let small = machine.run(&fill("remote_flush", 50, 100))?;
    let large = machine.run(&fill("remote_flush", 4, COLD_BYTES))?;
    println!("  50 small commits at remote_flush: {} s, 4 of 1 MiB: {} s", small.trim(), large.trim());
    let info = machine.run(&format!("power info --address {LEADER}"))?;
    let stat = machine.run("cat /proc/net/tls_stat")?;
    machine.run(&format!("{}\n{}", stop("b"), stop("a")))?;
    println!("  {}", machine.run(&format!("walferry log verify --data {MOUNT}/a --against {MOUNT}/b"))?.trim());
    let complaints = complaints(kernel, &info, &stat);
    if complaints.is_empty() {
        return Ok(seconds);
    }
    let logs = machine.run("cat /mnt/a.log /mnt/b.log")?;
    Err(Failure::failed(format_args!("{how}: {}\n{logs}\n{info}\n{stat}", complaints.join("; "))))
}

/// The value of `key` in lines such as `key:value` and `key   value`; 0 when there is none.
fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let rest = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix([':', ' ', '\t']));
    rest.map_or("0", str::trim)
}

/// What the node and the guest's kernel tell, where it is not what it should be.
fn complaints(kernel: bool, info: &str, stat: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut check = |what: &str, text: &str, right: &dyn Fn(u64) -> bool| {
        let found = value(text, what);
        println!("  {what}: {found}");
        if !found.parse().is_ok_and(right) {
            wrong.push(format!("{what} is {found}"));
        }
    };
    let (some, none) = (|number| number > 0, |number| number == 0);
    check("tls_ktls_connections", info, if kernel { &some } else { &none });
    check("tls_relay_connections", info, if kernel { &none } else { &some });
    // What the log buffer holds is sent from memory.
    check("shipped_sendfile_bytes", info, &|bytes| bytes > COLD * COLD_BYTES / 2);
    check("shipped_zc_bytes", info, &none);
    check("TlsTxSw", stat, if kernel { &some } else { &none });
    check("TlsRxSw", stat, if kernel { &some } else { &none });
    check("TlsDecryptError", stat, &none);
    let (found, expected) = (value(info, "replica_b_transport"), if kernel { "ktls" } else { "relay" });
    println!("  replica_b_transport: {found}");
    if found != expected {
        wrong.push(format!("replica_b_transport is {found}"));
    }
    wrong
}

/// A CA's certificate, one that it signed for both nodes, and that one's key.
fn certificates() -> Result<[String; 3], Failure> {
    let make = || -> Result<[String; 3], rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let own = KeyPair::generate()?;
        Ok([ca, params.signed_by(&own, &issuer)?.pem(), own.serialize_pem()])
    };
    make().during("make certificates")
}

/// Tests know the binary and a directory for their files by the paths of the build.
fn run_test(kit: &Kit, test: &Path) -> Result<(), Failure> {
    let mut machine = boot(kit)?;
    let binary = &kit.walferry;
    let beside = binary.parent().unwrap_or(Path::new("/"));
    let target = beside.parent().unwrap_or(Path::new("/"));
    machine.run(&format!(
        "mkdir -p {beside} && ln -s /bin/walferry {binary} && ln -s {MOUNT} {target}/tmp",
        beside = beside.display(),
        binary = binary.display(),
        target = target.display()
    ))?;
    let script = format!("TMPDIR={MOUNT} {} --test-threads 1 --nocapture 2>&1", test.display());
    let (code, output) = machine.ask(&script, TESTS_TIME_MAX)?;
    let stat = machine.run("grep -v ' 0$' /proc/net/tls_stat")?;
    println!("{}:\n{}\n{}", test.display(), output.trim(), stat.trim());
    if code == 0 { Ok(()) } else { Err(Failure::failed(format_args!("{}: exit code {code}", test.display()))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str =
        "tls_ktls_connections:1\ntls_relay_connections:0\nshipped_sendfile_bytes:99000000\nreplica_b_transport:ktls";
    const STAT: &str = "TlsTxSw                 \t2\nTlsRxSw\t2\nTlsDecryptError\t0";

    #[test]
    fn a_relay_in_the_place_of_the_kernel_is_told() {
        assert_eq!(complaints(true, INFO, STAT), Vec::<String>::new());
        let relayed = INFO.replace("connections:1", "connections:0").replace(":ktls", ":relay");
        let wrong = complaints(true, &relayed, STAT);
        assert_eq!(wrong, ["tls_ktls_connections is 0", "replica_b_transport is relay"]);
        assert_eq!(complaints(true, INFO, &STAT.replace("Error\t0", "Error\t3")), ["TlsDecryptError is 3"]);
    }
}
