//! The limit of file descriptors, raised at the start to what the configuration needs. Called once by `reactor`.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What a node opens beside its clients' sockets, generously: peers, segments, the store, base copies, the ring.
const OTHER_DESCRIPTORS: u64 = 512;

/// Of a client over TLS where a thread speaks it: its socket and both ends of a pair.
pub const RELAYED_CLIENT_DESCRIPTORS: u64 = 3;

/// Raises the limit so far that `clients_max` clients fit, each of which may take so many descriptors; gives how many fit, and says so when it is fewer.
pub fn make_room(clients_max: usize, per_client: u64) -> usize {
    let needed = clients_max as u64 * per_client + OTHER_DESCRIPTORS;
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => {
            tracing::warn!(%error, "the limit of file descriptors is not known; clients_max is taken as it is");
            return clients_max;
        }
    };
    if soft >= needed {
        return clients_max;
    }
    // Beyond the hard limit only root may go, and a unit may forbid even that.
    let raised = [(needed, hard.max(needed)), (needed.min(hard), hard)]
        .into_iter()
        .find(|(soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, *soft, *hard).is_ok())
        .map_or(soft, |(soft, _)| soft);
    let fits = clients_that_fit(clients_max, per_client, raised);
    if fits < clients_max {
        tracing::warn!(
            clients_max,
            limit = raised,
            "only {fits} clients are taken: clients_max = {clients_max} needs {needed} file descriptors and the limit is {raised}; \
             raise it (LimitNOFILE= in the unit, ulimit -Hn) or choose a smaller clients_max"
        );
    }
    fits
}

/// With few descriptors in all the log and the peers come before clients.
fn clients_that_fit(clients_max: usize, per_client: u64, descriptors: u64) -> usize {
    let others = OTHER_DESCRIPTORS.min(descriptors / 2);
    clients_max.min(usize::try_from((descriptors - others) / per_client).unwrap_or(usize::MAX)).max(1)
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
        assert_eq!(clients_that_fit(10_000, 1, 0), 1, "somebody has to be able to stop it");
    }
}
