//! What a hostile peer may say on either side of a move, and the small records that open an image.
#![no_main]

use libfuzzer_sys::{fuzz_crossover, fuzz_mutator, fuzz_target};
use pod_migrate::arrival;
use pod_migrate::capture::Moment;
use pod_migrate::image::{Kind, Reader};
use pod_migrate::migrate::protocol::{Answer, Say};

fuzz_mutator!(|data: &mut [u8], size: usize, most: usize, seed: u32| {
    pod_fuzz::mutate_stream(data, size, most, seed)
});
fuzz_crossover!(|one: &[u8], other: &[u8], out: &mut [u8], seed: u32| {
    pod_fuzz::cross_streams(one, other, out, seed)
});

fuzz_target!(|data: &[u8]| {
    let Ok(mut reader) = Reader::new(data) else { return };
    if let Ok(origin) = arrival::origin(&mut reader) {
        assert!(pod_runtime::store::check_id(&origin.spec.id).is_ok());
    }
    let Ok(mut reader) = Reader::new(data) else { return };
    while let Ok(Some(record)) = reader.next() {
        if record.kind == Kind::MOMENT {
            let moment = record.state::<Moment>();
            let _ = moment.map(|moment| arrival::clocks(&moment));
            continue;
        }
        if let Ok(Say::Offer(offer)) = record.state() {
            let _ = arrival::check_spec(&offer.spec);
        }
        match record.state::<Answer>() {
            Ok(Answer::Failed(report)) => drop(pod_runtime::Problem::from(report).chain()),
            Ok(Answer::Refused(reports)) => {
                reports.into_iter().for_each(|report| drop(pod_runtime::Problem::from(report).chain()));
            }
            _ => {}
        }
    }
});
