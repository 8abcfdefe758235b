use super::*;
use crate::migrate::journal::ask;
use pod_runtime::samples::spec;
use pod_runtime::status::now;
use pod_runtime::store::{new_id, write_json};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_at(dir.path().join("data"), dir.path().join("run")).unwrap();
    (dir, store)
}

const GONE: ProcessKey = ProcessKey { pid: 1, start_time: u64::MAX };

fn job(id: &str, role: Role, phase: Phase, pod: &str) -> Job {
    Job { role, pod: pod.into(), name: "web".into(), peer: "hostB".into(), ..Job::here(id, phase, GONE) }
}

fn phase(store: &Store, id: &str) -> Phase {
    Journal::open(store, id).unwrap().job.phase
}

/// What the pod looks like is what counts, not how old the entry is.
#[test]
fn a_job_at_the_source_is_settled_by_what_became_of_the_pod() {
    let (_dir, store) = store();
    let cases = [
        // Killed between go_on and the journal, in the commit: it runs on here.
        (Phase::Committing, Some(State::Running), None, Some(Phase::Aborted)),
        (Phase::Committing, Some(State::Moved), None, Some(Phase::Done)),
        (Phase::Committing, None, None, None),
        (Phase::Committing, Some(State::Migrating), Some("0007"), Some(Phase::Aborted)),
        (Phase::Committing, Some(State::Migrating), None, None),
        (Phase::Committing, Some(State::Exited), None, None),
        // A power cut left an old entry, and a pod that has ended with it.
        (Phase::Frozen, Some(State::Dead), None, None),
        (Phase::Copying, Some(State::Dead), None, None),
        (Phase::Copying, Some(State::Moved), None, Some(Phase::Done)),
        (Phase::Frozen, Some(State::Running), None, Some(Phase::Aborted)),
        (Phase::Frozen, None, None, Some(Phase::Aborted)),
    ];
    for (number, (before, state, other, expected)) in cases.into_iter().enumerate() {
        let (id, pod) = (format!("00{number:02x}ff"), new_id().unwrap());
        Journal::begin(&store, job(&id, Role::Source, before, &pod)).unwrap();
        if let Some(state) = state {
            let pod = store.reserve(&spec(&pod, &format!("web{number}"))).unwrap();
            pod.update(|status| {
                (status.state, status.started) = (state, Some(now()));
                status.job = Some(other.unwrap_or(&id).to_owned());
                if state == State::Dead {
                    (status.state, status.boot_id) = (State::Running, "another".into());
                }
            })
            .unwrap();
        }
        let pending = repair(&store).unwrap().iter().any(|job| job.id == id);
        let told = format!("{before:?} of a pod that is {state:?}");
        assert_eq!(pending, expected.is_none(), "{told}");
        assert_eq!(phase(&store, &id), expected.unwrap_or(before), "{told}");
    }
}

#[test]
fn one_job_that_cannot_be_settled_stands_in_nobodys_way() {
    let (_dir, store) = store();
    let pod = new_id().unwrap();
    Journal::begin(&store, Job { started: 1, ..job("0001", Role::Source, Phase::Frozen, &pod) }).unwrap();
    let pod = store.reserve(&spec(&pod, "web")).unwrap();
    // There is nothing to lock without a run folder.
    pod.update(|status| (status.state, status.job) = (State::Migrating, Some("0001".into()))).unwrap();
    assert!(!pod.run_dir().exists());
    Journal::begin(&store, job("0002", Role::Source, Phase::Frozen, &new_id().unwrap())).unwrap();
    assert!(repair(&store).unwrap().is_empty());
    assert_eq!((phase(&store, "0001"), phase(&store, "0002")), (Phase::Frozen, Phase::Aborted));
}

#[test]
fn both_hosts_say_where_the_pod_is() {
    let (_dir, store) = store();
    let (source, destination) = (Role::Source, Role::Destination);
    let cases = [
        ("0001", source, Phase::Done, Lives::There),
        ("0002", source, Phase::Aborted, Lives::Nowhere),
        ("0003", destination, Phase::Running, Lives::Here),
        ("0004", destination, Phase::Aborted, Lives::There),
        ("0006", source, Phase::Frozen, Lives::Nowhere),
        // Nobody works on it: it never will.
        ("0005", destination, Phase::Receiving, Lives::There),
    ];
    for (id, role, phase, lives) in cases {
        Journal::begin(&store, job(id, role, phase, &new_id().unwrap())).unwrap();
        assert_eq!(resume(&store, id).unwrap(), lives, "{role:?}, {phase:?}");
    }
}

#[test]
fn what_is_over_stays_as_it_is() {
    let (_dir, store) = store();
    let mut tool = Journal::begin(&store, job("0001", Role::Source, Phase::Copying, "0123456789ab")).unwrap();
    let mut other = Journal::open(&store, "0001").unwrap();
    other.phase(Phase::Done).unwrap();
    assert_eq!(tool.phase(Phase::Committing).unwrap_err().code(), "E-LINK");
    tool.aborted(&Problem::new("E-LINK", "late")).unwrap();
    assert_eq!((tool.job.phase, phase(&store, "0001")), (Phase::Done, Phase::Done));
}

#[test]
fn what_a_power_cut_left_of_an_entry_never_runs() {
    let (_dir, store) = store();
    let mut late = Journal::begin(&store, job("0001", Role::Destination, Phase::Receiving, "0123456789ab")).unwrap();
    let path = store.jobs_dir().unwrap().join("0001.json");
    for torn in ["", "{\"id\": \"00"] {
        std::fs::write(&path, torn).unwrap();
        assert_eq!(ask(&store, "0001", "").unwrap(), Phase::Aborted);
    }
    assert_eq!(late.decide(Phase::Running).unwrap(), Phase::Aborted);
    // What another version of pod wrote is not torn: nobody here says what became of it.
    std::fs::write(&path, "{\"phase\": \"dreaming\"}").unwrap();
    assert!(ask(&store, "0001", "").is_err() && late.decide(Phase::Running).is_err());
    // Nor does one of which nothing is left.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(late.decide(Phase::Running).unwrap(), Phase::Aborted);
}

#[test]
fn what_ran_here_is_not_forgotten() {
    let (_dir, store) = store();
    let entry = |id: &str| store.jobs_dir().unwrap().join(format!("{id}.json"));
    for (id, phase) in [("0001", Phase::Running), ("0002", Phase::Aborted), ("0003", Phase::Receiving)] {
        write_json(&entry(id), &Job { updated: 1, ..job(id, Role::Destination, phase, "0123456789ab") }).unwrap();
    }
    Journal::begin(&store, job("0004", Role::Destination, Phase::Receiving, "ba9876543210")).unwrap();
    assert_eq!(["0001", "0002", "0003"].map(|id| entry(id).exists()), [true, false, true]);
    assert_eq!(ask(&store, "0001", "").unwrap(), Phase::Running);
}

#[test]
fn who_comes_back_is_not_taken_for_who_left() {
    let (_dir, store) = store();
    let id = new_id().unwrap();
    let mut journal =
        Journal::begin(&store, Job { started: 100, ..job("0001", Role::Source, Phase::Committing, &id) }).unwrap();
    let pod = store.reserve(&spec(&id, "web")).unwrap();
    std::fs::write(pod.upper_dir().join("file"), "the only copy").unwrap();
    let dead_since = |started| {
        pod.update(|status| (status.state, status.started) = (State::Dead, Some(started))).unwrap();
    };
    dead_since(200);
    assert!(conclude(&store, Some(&pod), &mut journal, Fate::Ran).unwrap());
    assert!(pod.upper_dir().join("file").exists() && pod.status().unwrap().state == State::Dead);
    dead_since(50);
    assert!(conclude(&store, Some(&pod), &mut journal, Fate::Ran).unwrap());
    assert!(!pod.upper_dir().exists() && pod.status().unwrap().state == State::Moved);
}

#[test]
fn a_pod_that_comes_back_ends_the_questions_about_it() {
    let (_dir, store) = store();
    let id = new_id().unwrap();
    Journal::begin(&store, job("0001", Role::Source, Phase::Committing, &id)).unwrap();
    Journal::begin(&store, job("0002", Role::Source, Phase::Committing, "0123456789ab")).unwrap();
    it_left(&store, &id).unwrap();
    assert_eq!((phase(&store, "0001"), phase(&store, "0002")), (Phase::Done, Phase::Committing));
}
