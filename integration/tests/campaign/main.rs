//! What must never happen: two copies, no copy, anything lost, anything left. Round after round a pod with a live client is moved,
//! and a fault of a drawn kind is done to the move at a drawn moment of a drawn phase. Then the fault is over, what `pod` names is
//! done, and: exactly one copy runs, the client has all that was acknowledged to it over the connections that it always
//! had, both journals say the same, nothing is left on the hosts without the pod, and the next move works.
//!
//! A line a round; `SEED=… FAULTS=… ` repeats a run (of which `FIRST=n` begins with the nth round). By hand: `integration/faults`.
//! Several lanes, each with hosts of its own, take the rounds in turn (`LANES`), for most of the time of many is waiting.

mod draw;
mod harm;
mod lane;
mod table;
mod tool;

use anyhow::{Result, ensure};
use draw::Draw;
use integration::faults::seed;
use lane::Lane;
use std::sync::Mutex;
use std::time::Instant;
use table::Table;

/// With so many rounds there is time to outwait everybody's patience.
const MANY: usize = 150;
/// A campaign that finds so much has found enough.
const ENOUGH: usize = 12;

fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

struct Campaign {
    left: Mutex<std::vec::IntoIter<Draw>>,
    seen: Mutex<Table>,
    patient: bool,
}

impl Campaign {
    fn next(&self) -> Option<Draw> {
        if self.seen.lock().ok()?.failures() >= ENOUGH {
            return None;
        }
        self.left.lock().ok()?.next()
    }

    /// Takes rounds until there is none any more. After one that failed the hosts are new.
    fn lane(&self) -> Result<()> {
        let mut lane = Lane::new(self.patient)?;
        while let Some(draw) = self.next() {
            let began = Instant::now();
            let round = lane.round(&draw);
            let took = began.elapsed().as_secs_f64();
            let failed = round.is_err();
            match &round {
                Ok((_, line)) => println!("{draw} {line}; {took:.1} s"),
                Err(error) => println!("{draw} FAILED after {took:.1} s: {error:#}\n{}", lane.scene()),
            }
            if let Ok(mut seen) = self.seen.lock() {
                seen.add(&draw, round.ok().map(|(seen, _)| seen));
            }
            if failed {
                drop(lane);
                lane = Lane::new(self.patient)?;
            }
        }
        lane.end()
    }
}

#[test]
fn faults_in_every_phase() -> Result<()> {
    let (seed, count, first) = (seed(), number("FAULTS", 60), number("FIRST", 1));
    println!("SEED={seed} FAULTS={count} FIRST={first}");
    let draws = draw::draws(seed, first + count - 1).split_off(first - 1);
    let left = Mutex::new(draws.into_iter());
    let campaign = Campaign { left, seen: Mutex::default(), patient: count >= MANY };
    let lanes: Vec<Result<()>> = std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..number("LANES", 3).min(count)).map(|_| scope.spawn(|| campaign.lane())).collect();
        lanes.into_iter().map(|lane| lane.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a lane panicked")))).collect()
    });
    let seen = campaign.seen.into_inner()?;
    println!("{seen}");
    lanes.into_iter().collect::<Result<Vec<()>>>()?;
    ensure!(seen.failures() == 0, "{} rounds failed; SEED={seed} FAULTS={count} repeats them", seen.failures());
    if draw::only() != (None, None) { Ok(()) } else { seen.all_met(count) }
}
