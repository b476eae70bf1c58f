mod common;
use common::replica::hello;
use common::*;
use std::io::{Read, Write};
use std::time::Instant;
use walferry_cluster::message::*;
use walferry_engine::lsn::Lsn;
#[test]
fn bench() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    let t = Instant::now();
    leader.append(std::iter::repeat_n(900_000, 1700));
    leader.flush();
    eprintln!(
        "wrote {} MB at {} MB/s",
        leader.log.flushed().0 >> 20,
        (leader.log.flushed().0 as f64 / t.elapsed().as_secs_f64() / 1e6) as u64
    );
    for round in 0..4 {
        for n in 0..=leader.log.flushed().segment(SEGMENT_BYTES).0 {
            use std::os::fd::AsRawFd;
            let f = std::fs::File::open(leader.log.segment_path(walferry_engine::lsn::SegmentNo(n))).unwrap();
            unsafe { libc::posix_fadvise(f.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
        if round == 3 {
            let t = Instant::now();
            let mut buf = vec![0u8; 1 << 20];
            let mut total = 0;
            for n in 0..=leader.log.flushed().segment(SEGMENT_BYTES).0 {
                let mut f = std::fs::File::open(leader.log.segment_path(walferry_engine::lsn::SegmentNo(n))).unwrap();
                loop {
                    let r = f.read(&mut buf).unwrap();
                    if r == 0 {
                        break;
                    }
                    total += r;
                }
            }
            eprintln!("cold sequential read {} MB/s", (total as f64 / t.elapsed().as_secs_f64() / 1e6) as u64);
            break;
        }
        let mut s = std::net::TcpStream::connect(leader.address).unwrap();
        let mut b = Vec::new();
        Message::Hello(hello("a", &[], &[(1, 0)])).encode(&mut b);
        s.write_all(&b).unwrap();
        let end = leader.log.flushed().0;
        let t = Instant::now();
        let h = std::thread::spawn(move || {
            let mut buf = vec![0u8; 1 << 20];
            let mut total = 0u64;
            while total < end - (40 << 20) {
                let n = s.read(&mut buf).unwrap();
                if n == 0 {
                    break;
                }
                total += n as u64;
            }
            (total, t.elapsed(), s)
        });
        let cpu0 = cpu();
        while !h.is_finished() {
            leader.turn();
        }
        let (total, el, _s) = h.join().unwrap();
        eprintln!("catch-up {} MB/s, process cpu {:.2}s", (total as f64 / el.as_secs_f64() / 1e6) as u64, cpu() - cpu0);
        leader.run("gone", |l| l.status("a").last_error != "" || l.status("a").sent > Lsn(0));
        drop(_s);
    }
}
fn cpu() -> f64 {
    let mut u: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut u) };
    let f = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    f(u.ru_utime) + f(u.ru_stime)
}
