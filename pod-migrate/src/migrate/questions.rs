//! The destination of a check: answers about pods, one after the other, and takes nothing.

use super::destination::out_of_order;
use super::offer;
use super::protocol::{Answer, Hello, Offer, Say};
use super::way;
use crate::image::Kind;
use crate::link::Link;
use pod_runtime::Result;
use pod_runtime::store::Store;

/// Until the source has no more. One of the release before asks once and goes.
pub(super) fn answer(store: &Store, mut link: Link, hello: &Hello) -> Result<()> {
    let mut asked = false;
    loop {
        match way::hear(&mut link) {
            Ok(Say::Offer(offer)) => {
                link.say(&about(store, hello, &offer))?;
            }
            Ok(Say::Measure) => {
                let filled = measure(&mut link)?;
                link.say(&filled)?;
            }
            Ok(_) => return Err(out_of_order("OFFER")),
            // It is how a source says that it has heard enough.
            Err(problem) => return if asked { Ok(()) } else { Err(problem) },
        }
        asked = true;
    }
}

fn about(store: &Store, hello: &Hello, offer: &Offer) -> Answer {
    let (mut problems, warnings) = offer::against(store, offer, hello);
    if problems.is_empty() {
        problems.extend(offer::network_could(store, &offer.spec).err());
    }
    match problems.is_empty() {
        true => Answer::Reserved { warnings },
        false => Answer::Refused(problems.iter().map(pod_runtime::Problem::report).collect()),
    }
}

/// Filler is passed over by the reader; the source counts the time until it hears that all of it came.
fn measure(link: &mut Link) -> Result<Answer> {
    let before = link.reader.bytes();
    let record = link.reader.next()?;
    let measured = record.filter(|record| record.kind == Kind::MESSAGE).map(|record| record.state());
    match measured.transpose()? {
        Some(Say::Measured) => Ok(Answer::Filled { bytes: link.reader.bytes() - before }),
        _ => Err(out_of_order("MEASURED")),
    }
}
