//! One client of the load: runs scripts step by step. A core: answers and `now` in, command bytes and statistics out;
//! knows no socket and reads no clock. Driven by a connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;

use super::expr::Random;
use super::reply::Kind;
use super::script::{Boundary, Payload, Script, Step, Template};
use super::stats::Stats;

/// What all clients of a run share.
#[derive(Debug)]
pub struct Workload {
    /// The scripts.
    pub scripts: Vec<Script>,
    /// The values that variables start with.
    pub values: Vec<i64>,
    /// The slot of `client_id`.
    pub client_id_slot: Option<usize>,
    /// What `:payload` draws from.
    pub payload: Payload,
}

impl Workload {
    /// Statistics that fit these scripts.
    pub fn empty_stats(&self) -> Stats {
        Stats::new(&self.scripts.iter().map(|script| script.steps.len()).collect::<Vec<_>>())
    }

    /// A script by its weight.
    pub fn choose(&self, random: &mut Random) -> usize {
        if self.scripts.len() == 1 {
            return 0;
        }
        let total: u64 = self.scripts.iter().map(|script| script.weight).sum();
        let mut left = random.random_range(0..total);
        for (index, script) in self.scripts.iter().enumerate() {
            match left.checked_sub(script.weight) {
                Some(rest) => left = rest,
                None => return index,
            }
        }
        unreachable!("the weights add up to the total")
    }
}

/// What a client needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// `out` to be sent, if there is any, and an answer.
    Answer,
    /// To be asked again after this time.
    Sleep(Duration),
    /// The transaction is over and counted.
    Done,
}

#[derive(Debug)]
struct Awaited {
    step: usize,
    sent_at: Instant,
    /// Closes a MULTI after an error; its answer belongs to no step.
    cleanup: bool,
}

/// One client.
#[derive(Debug)]
pub struct Session {
    workload: Arc<Workload>,
    variables: Vec<i64>,
    random: Random,
    /// Bytes to send.
    pub out: Vec<u8>,
    awaited: VecDeque<Awaited>,
    script: usize,
    step: usize,
    pipelining: bool,
    in_multi: bool,
    latency_from: Instant,
    error: Option<String>,
}

impl Session {
    /// A client with this number and generator.
    pub fn new(workload: Arc<Workload>, client_id: usize, random: Random, now: Instant) -> Session {
        let mut variables = workload.values.clone();
        if let Some(slot) = workload.client_id_slot {
            variables[slot] = client_id as i64;
        }
        Session {
            workload,
            variables,
            random,
            out: Vec::new(),
            awaited: VecDeque::new(),
            script: 0,
            step: 0,
            pipelining: false,
            in_multi: false,
            latency_from: now,
            error: None,
        }
    }

    /// Starts a transaction; its latency counts from `scheduled`.
    pub fn begin(&mut self, scheduled: Instant, now: Instant, stats: &mut Stats) -> Next {
        debug_assert!(self.awaited.is_empty() && self.out.is_empty());
        self.script = self.workload.choose(&mut self.random);
        self.step = 0;
        self.pipelining = false;
        self.in_multi = false;
        self.latency_from = scheduled;
        self.error = None;
        self.run(now, stats)
    }

    /// Runs on until an answer or time is needed. Called after `begin`, after a sleep and after the last answer.
    pub fn run(&mut self, now: Instant, stats: &mut Stats) -> Next {
        let workload = Arc::clone(&self.workload);
        let steps = &workload.scripts[self.script].steps;
        loop {
            let must_wait = !self.awaited.is_empty() && !self.pipelining;
            if must_wait {
                return Next::Answer;
            }
            if self.error.is_some() && self.awaited.is_empty() {
                return self.end(now, stats);
            }
            let Some(step) = steps.get(self.step) else {
                return self.end(now, stats);
            };
            self.step += 1;
            match step {
                Step::Set(slot, expr) => match expr.value(&self.variables, &mut self.random) {
                    Ok(value) => self.variables[*slot] = value,
                    Err(error) => self.fail_script(error.to_string()),
                },
                Step::Sleep(expr, unit) => match expr.value(&self.variables, &mut self.random) {
                    Ok(times) => {
                        return Next::Sleep(unit.saturating_mul(u32::try_from(times).unwrap_or(0)));
                    }
                    Err(error) => self.fail_script(error.to_string()),
                },
                Step::Command(template) => self.send(template, now),
                Step::StartPipeline => self.pipelining = true,
                Step::EndPipeline => self.pipelining = false,
            }
        }
    }

    fn send(&mut self, template: &Template, now: Instant) {
        template.encode(&mut self.out, &self.variables, &self.workload.payload, &mut self.random);
        self.awaited.push_back(Awaited { step: self.step - 1, sent_at: now, cleanup: false });
        match template.boundary {
            Boundary::Begin => self.in_multi = true,
            Boundary::Exec | Boundary::Discard => self.in_multi = false,
            Boundary::None => {}
        }
    }

    /// The script itself cannot go on; what is already sent is still waited for.
    fn fail_script(&mut self, why: String) {
        self.error.get_or_insert(format!("SCRIPT {}: {why}", self.workload.scripts[self.script].name));
        self.pipelining = false;
    }

    /// True while answers are outstanding.
    pub fn is_waiting(&self) -> bool {
        !self.awaited.is_empty()
    }

    /// One answer came. `error` is its text if it is one. `Err` if nothing was asked.
    pub fn answer(&mut self, kind: Kind, error: &str, now: Instant, stats: &mut Stats) -> Result<(), &'static str> {
        let awaited = self.awaited.pop_front().ok_or("the node answered without being asked")?;
        if awaited.cleanup {
            return Ok(());
        }
        let Step::Command(template) = &self.workload.scripts[self.script].steps[awaited.step] else {
            unreachable!("only commands are awaited")
        };
        let command = &mut stats.scripts[self.script].commands[awaited.step];
        match kind {
            Kind::Nil if template.boundary == Boundary::Exec => {
                command.failed += 1;
                self.error.get_or_insert_with(|| "ABORTED a watched key changed before EXEC".to_owned());
            }
            Kind::Error { .. } => {
                command.failed += 1;
                self.error.get_or_insert_with(|| error.to_owned());
            }
            Kind::Value | Kind::Nil => command.latency.record(now.saturating_duration_since(awaited.sent_at)),
        }
        Ok(())
    }

    fn end(&mut self, now: Instant, stats: &mut Stats) -> Next {
        if self.in_multi {
            // The script stopped inside of MULTI: the next one must not run in it.
            self.in_multi = false;
            self.out.extend_from_slice(b"*1\r\n$7\r\nDISCARD\r\n");
            self.awaited.push_back(Awaited { step: 0, sent_at: now, cleanup: true });
            return Next::Answer;
        }
        match self.error.take() {
            None => stats.succeeded(self.script, now.saturating_duration_since(self.latency_from)),
            Some(error) => stats.failed(self.script, &error),
        }
        self.step = usize::MAX;
        Next::Done
    }

    /// The connection broke in the middle of a transaction, or was given up after a refusal.
    pub fn lost(&mut self, why: &str, refused: bool, stats: &mut Stats) {
        let error = if refused { why.to_owned() } else { format!("CONNECTION {why}") };
        stats.failed(self.script, &error);
        self.awaited.clear();
        self.out.clear();
        self.error = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::script::Variables;
    use rand::SeedableRng;

    fn session(text: &str) -> (Session, Stats, Instant) {
        let mut variables = Variables::predefined(1, 5);
        let script = Script::parse("test", 1, text, &mut variables).unwrap();
        let mut random = Random::seed_from_u64(5);
        let payload = Payload::new(3, &mut random);
        let client_id_slot = variables.slot("client_id");
        let workload = Workload { scripts: vec![script], values: variables.values, client_id_slot, payload };
        let (stats, now) = (workload.empty_stats(), Instant::now());
        (Session::new(Arc::new(workload), 4, random, now), stats, now)
    }

    fn sent(session: &mut Session) -> String {
        String::from_utf8(std::mem::take(&mut session.out)).unwrap()
    }

    const ERROR: Kind = Kind::Error { from: 0, to: 0 };

    #[test]
    fn commands_go_one_by_one_and_latency_counts_from_the_schedule() {
        let (mut session, mut stats, start) = session("SET k :client_id\nGET k");
        let now = start + Duration::from_millis(30);
        assert_eq!(session.begin(start, now, &mut stats), Next::Answer);
        assert_eq!(sent(&mut session), "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\n4\r\n");
        session.answer(Kind::Value, "", now + Duration::from_millis(5), &mut stats).unwrap();
        assert_eq!(session.run(now + Duration::from_millis(5), &mut stats), Next::Answer);
        assert_eq!(sent(&mut session), "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n");
        session.answer(Kind::Nil, "", now + Duration::from_millis(10), &mut stats).unwrap();
        assert_eq!(session.run(now + Duration::from_millis(10), &mut stats), Next::Done);
        assert!((stats.latency.mean_ms() - 40.0).abs() < 1e-6, "30 ms late and 10 ms of work");
        assert!((stats.scripts[0].commands[0].latency.mean_ms() - 5.0).abs() < 1e-6);
    }

    #[test]
    fn a_pipeline_is_sent_at_once() {
        let (mut session, mut stats, now) = session("\\startpipeline\nMULTI\nINCR k\nEXEC\n\\endpipeline\nPING");
        assert_eq!(session.begin(now, now, &mut stats), Next::Answer);
        assert_eq!(sent(&mut session).matches('*').count(), 3);
        for _ in 0..3 {
            assert_eq!(session.run(now, &mut stats), Next::Answer, "the pipeline waits for every answer");
            session.answer(Kind::Value, "", now, &mut stats).unwrap();
        }
        assert_eq!(session.run(now, &mut stats), Next::Answer);
        assert!(sent(&mut session).contains("PING"));
    }

    #[test]
    fn an_error_fails_the_transaction_once_and_closes_its_multi() {
        let (mut session, mut stats, now) = session("MULTI\nINCR k\nEXEC");
        session.begin(now, now, &mut stats);
        session.answer(Kind::Value, "", now, &mut stats).unwrap();
        session.run(now, &mut stats);
        session.answer(ERROR, "READONLY the leader is 10.0.0.1:6400", now, &mut stats).unwrap();
        sent(&mut session);
        assert_eq!(session.run(now, &mut stats), Next::Answer);
        assert_eq!(sent(&mut session), "*1\r\n$7\r\nDISCARD\r\n");
        session.answer(Kind::Value, "", now, &mut stats).unwrap();
        assert_eq!(session.run(now, &mut stats), Next::Done);
        assert_eq!((stats.failed_count(), stats.latency.count), (1, 0));
        assert_eq!(stats.failures["READONLY"].count, 1);
        assert_eq!(session.begin(now, now, &mut stats), Next::Answer, "the next transaction starts clean");
    }

    #[test]
    fn a_nil_exec_is_an_aborted_transaction() {
        let (mut session, mut stats, now) = session("WATCH k\nMULTI\nINCR k\nEXEC");
        session.begin(now, now, &mut stats);
        for _ in 0..3 {
            session.answer(Kind::Value, "", now, &mut stats).unwrap();
            session.run(now, &mut stats);
        }
        session.answer(Kind::Nil, "", now, &mut stats).unwrap();
        assert_eq!(session.run(now, &mut stats), Next::Done);
        assert_eq!(stats.failures["ABORTED"].count, 1);
    }

    #[test]
    fn sleeps_and_script_errors_end_well() {
        let (mut session, mut stats, now) = session("\\sleep 20 ms\n\\set x 1 / (:scale - 1)\nPING");
        assert_eq!(session.begin(now, now, &mut stats), Next::Sleep(Duration::from_millis(20)));
        assert_eq!(session.run(now, &mut stats), Next::Done);
        assert!(stats.failures["SCRIPT"].example.contains("division by zero"));
        assert!(session.answer(Kind::Value, "", now, &mut stats).is_err(), "nothing was asked");
    }

    #[test]
    fn a_lost_connection_is_one_failed_transaction() {
        let (mut session, mut stats, now) = session("PING");
        session.begin(now, now, &mut stats);
        session.lost("reset by peer", false, &mut stats);
        assert_eq!(stats.failures["CONNECTION"].count, 1);
        assert!(!session.is_waiting() && session.out.is_empty());
    }
}
