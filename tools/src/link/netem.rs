//! A link that the kernel's own emulator makes: a veth pair, one end in a network namespace, `tc netem` on both.
//! Needs root, iproute2 and the kernel's sch_netem. Nothing of ours is in the packets' way. Its jitter may change the
//! order of packets, which the other kinds keep.

use super::control::Control;
use super::namespace::{LINKS_MAX, Namespace, Plan, run};
use super::shape::{Direction, Shape, Way};

/// netem counts its buffer in packets; of full size on Ethernet.
const PACKET_BYTES: u64 = 1500;
/// What may be on its way: as much as the other kinds of link hold.
const HELD_PACKETS: u64 = super::delay_line::HELD_BYTES_MAX / PACKET_BYTES;

/// A running link; dropping it removes devices and namespace.
#[derive(Debug)]
pub struct Netem {
    control: Control,
    namespace: Namespace,
}

impl Netem {
    /// Makes the devices and the namespace and lets packets pass.
    pub fn start(shape: Shape) -> std::io::Result<Netem> {
        let control = Control::new(shape)?;
        let plan = free_plan()?;
        let started = Namespace::create(plan).and_then(|namespace| {
            namespace.connect()?;
            let netem = Netem { control, namespace };
            netem.apply("add")?;
            Ok(netem)
        });
        // The namespace takes its end of the pair with it, and so the other one, once it has it.
        started.inspect_err(|_| drop(run("ip", &["link", "delete", &plan.near_device()])))
    }

    /// Gives the kernel the shape and the cuts that `control` has.
    pub fn update(&self) -> std::io::Result<()> {
        self.apply("change")
    }

    fn apply(&self, verb: &str) -> std::io::Result<()> {
        let behaviour = self.control.behaviour();
        for direction in Direction::BOTH {
            let mut way = behaviour.shape.way(direction);
            if behaviour.cut[direction.index()] {
                way.loss = 1.0;
            }
            let arguments = arguments(verb, self.namespace.plan(), direction, &way);
            let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let missing = |error: std::io::Error| match error.to_string() {
                text if text.contains("qdisc kind is unknown") || text.contains("No such file") => {
                    std::io::Error::other(format!(
                        "this kernel has no netem (`modprobe sch_netem`); --kind tun needs none: {text}"
                    ))
                }
                _ => error,
            };
            run("tc", &words).map_err(missing)?;
        }
        Ok(())
    }

    /// To watch it, and to change it together with `update`.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Its far end.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

/// The first number for which a pair of devices can be made.
fn free_plan() -> std::io::Result<Plan> {
    for number in 0..LINKS_MAX {
        let plan = Plan::new(number);
        let (near, far) = (plan.near_device(), plan.far_device());
        match run("ip", &["link", "add", &near, "type", "veth", "peer", "name", &far]) {
            Ok(()) => return Ok(plan),
            Err(error) if error.to_string().contains("File exists") => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::Error::other(format!("{LINKS_MAX} links run on this host already")))
}

/// What `tc` is told for one direction: what leaves near is shaped at the near device, what comes back at the far one.
fn arguments(verb: &str, plan: Plan, direction: Direction, way: &Way) -> Vec<String> {
    let (namespace, near, far) = (plan.namespace(), plan.near_device(), plan.far_device());
    let micros = |time: std::time::Duration| format!("{}us", time.as_micros());
    let device = match direction {
        Direction::Out => vec!["qdisc", verb, "dev", &near],
        Direction::Back => vec!["-n", &namespace, "qdisc", verb, "dev", &far],
    };
    let mut words: Vec<String> = device.into_iter().map(str::to_owned).collect();
    let mut add = |text: &str| words.extend(text.split(' ').map(str::to_owned));
    let packets = way.rate.map_or(HELD_PACKETS, |rate| {
        // netem has one queue for what waits and what is on its way.
        let on_its_way = rate.0 as u128 * way.delay.as_micros() / 8_000_000;
        (way.buffer_bytes + on_its_way as u64).div_ceil(PACKET_BYTES).min(HELD_PACKETS)
    });
    add(&format!("root netem limit {packets} delay {}", micros(way.delay)));
    if !way.jitter.is_zero() {
        add(&micros(way.jitter));
    }
    if way.loss > 0.0 {
        add(&format!("loss {}%", way.loss * 100.0));
    }
    if let Some(rate) = way.rate {
        add(&format!("rate {rate}"));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn tc_is_told_each_direction() {
        let mut shape = Shape::with_rtt(Duration::from_millis(50));
        for assignment in ["jitter=100us", "loss=0.5%", "rate=100mbit", "asymmetry=60%"] {
            shape.assign(assignment).unwrap();
        }
        let words = |direction| arguments("add", Plan::new(3), direction, &shape.way(direction)).join(" ");
        assert_eq!(
            words(Direction::Out),
            "qdisc add dev walferry3 root netem limit 950 delay 30000us 100us loss 0.5% rate 100mbit"
        );
        assert_eq!(
            words(Direction::Back),
            "-n walferry3 qdisc add dev walferry3f root netem limit 866 delay 20000us 100us loss 0.5% rate 100mbit"
        );
        let plain = Shape::with_rtt(Duration::from_millis(1)).way(Direction::Out);
        let words = arguments("change", Plan::new(0), Direction::Out, &plain).join(" ");
        assert_eq!(words, format!("qdisc change dev walferry0 root netem limit {HELD_PACKETS} delay 500us"));
    }
}
