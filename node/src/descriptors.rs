//! The limit of file descriptors, raised at the start to what the configuration needs. Called once by `reactor`.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What a node opens beside its clients' sockets, generously: peers, segments, the store, snapshots, the ring.
const OTHER_DESCRIPTORS: u64 = 512;
/// What it needs of that in any case: no client may take the descriptor that the log, the store or a peer has to open next.
const RESERVED_DESCRIPTORS: u64 = 128;
/// Fewer clients than these (or than `clients_max`) are no service, and an operator has to find a place among them.
const CLIENTS_MIN: usize = 8;
const _: () = assert!(RESERVED_DESCRIPTORS <= OTHER_DESCRIPTORS);

/// Of a client over TLS where a thread speaks it: its socket and both ends of a pair.
pub const RELAYED_CLIENT_DESCRIPTORS: u64 = 3;

/// Raises the limit so far that `clients_max` clients fit, each of which may take so many descriptors; gives how many fit, and says so
/// when it is fewer. An error tells what is needed, when that is too few to serve.
pub fn raise_limit(clients_max: usize, per_client: u64) -> Result<usize, String> {
    let needed = clients_max as u64 * per_client + OTHER_DESCRIPTORS;
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => {
            tracing::warn!(%error, "the limit of file descriptors is not known; clients_max is taken as it is");
            return Ok(clients_max);
        }
    };
    if soft >= needed {
        return Ok(clients_max);
    }
    // Beyond the hard limit only root may go, and a unit may forbid even that.
    let raised = [(needed, hard.max(needed)), (needed.min(hard), hard)]
        .into_iter()
        .find(|(soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, *soft, *hard).is_ok())
        .map_or(soft, |(soft, _)| soft);
    let clients_min = clients_max.min(CLIENTS_MIN);
    let fits = clients_that_fit(clients_max, per_client, raised);
    if fits < clients_min {
        let clients = clients_min as u64 * per_client;
        return Err(format!(
            "the limit of file descriptors is {raised}, and a node needs {}: {RESERVED_DESCRIPTORS} for its log, its store and its peers, \
             and {clients} for its first {clients_min} clients; raise it (LimitNOFILE= in the unit, ulimit -Hn)",
            RESERVED_DESCRIPTORS + clients
        ));
    }
    if fits < clients_max {
        tracing::warn!(
            clients_max,
            limit = raised,
            "only {fits} clients are taken: clients_max = {clients_max} needs {needed} file descriptors and the limit is {raised}; \
             raise it (LimitNOFILE= in the unit, ulimit -Hn) or choose a smaller clients_max"
        );
    }
    Ok(fits)
}

/// With few descriptors in all the log and the peers come before clients.
fn clients_that_fit(clients_max: usize, per_client: u64, descriptors: u64) -> usize {
    let others = OTHER_DESCRIPTORS.min(descriptors / 2).max(RESERVED_DESCRIPTORS);
    let left = descriptors.saturating_sub(others) / per_client;
    clients_max.min(usize::try_from(left).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_leave_descriptors_to_the_log_and_the_peers() {
        assert_eq!(clients_that_fit(10_000, 1, 20_000), 10_000);
        assert_eq!(clients_that_fit(10_000, 1, 4_096), 3_584);
        assert_eq!(clients_that_fit(10_000, 1, 256), 128);
        assert_eq!(clients_that_fit(10_000, RELAYED_CLIENT_DESCRIPTORS, 3_512), 1_000);
        assert_eq!(clients_that_fit(10_000, 1, 140), 12);
        assert_eq!(clients_that_fit(10_000, 1, 40), 0, "all of them are the log's, the store's and the peers'");
    }
}
