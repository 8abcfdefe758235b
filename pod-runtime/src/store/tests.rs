use super::*;
use std::sync::Barrier;
use std::thread;

pub(crate) fn spec(name: &str) -> Spec {
    crate::samples::spec(&new_id().unwrap(), name)
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_at(dir.path().join("data"), dir.path().join("run")).unwrap();
    (dir, store)
}

#[test]
fn found_by_name_id_and_prefix() {
    let (_dir, store) = store();
    let pod = store.reserve(&spec("web")).unwrap();
    assert_eq!(store.pod("web").unwrap().id(), pod.id());
    assert_eq!(store.pod(pod.id()).unwrap().id(), pod.id());
    assert_eq!(store.pod(&pod.id()[..5]).unwrap().id(), pod.id());
    let problem = store.pod("wbe").unwrap_err();
    assert_eq!(problem.code(), "E-NOPOD");
    assert!(problem.way_out().unwrap().contains("'web'"), "{:?}", problem.way_out());
    pod.remove().unwrap();
    assert!(store.pods().unwrap().is_empty());
    assert_eq!(store.pod("web").unwrap_err().code(), "E-NOPOD");
}

#[test]
fn of_many_at_once_one_gets_the_name() {
    let (_dir, store) = store();
    let barrier = Barrier::new(8);
    let won = thread::scope(|scope| {
        let tries: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    store.reserve(&spec("one")).is_ok()
                })
            })
            .collect();
        tries.into_iter().filter(|_| true).map(|t| t.join().unwrap()).filter(|won| *won).count()
    });
    assert_eq!(won, 1);
    assert_eq!(store.pods().unwrap().len(), 1);
}

#[test]
fn a_tombstone_makes_way_for_its_own_return_and_frees_the_name() {
    let (_dir, store) = store();
    let moved = spec("web");
    let pod = store.reserve(&moved).unwrap();
    pod.update(|status| status.state = State::Moved).unwrap();
    let other = store.reserve(&spec("web")).unwrap();
    assert_eq!(store.pod("web").unwrap().id(), other.id());
    other.remove().unwrap();
    assert_eq!(store.pod("web").unwrap().id(), pod.id());
    store.reserve(&moved).unwrap();
    assert_eq!(store.pod("web").unwrap().status().unwrap().state, State::Creating);
}

#[test]
fn a_creator_that_died_holds_no_name() {
    let (_dir, store) = store();
    let pod = store.reserve(&spec("web")).unwrap();
    assert_eq!(store.reserve(&spec("web")).unwrap_err().code(), "E-NAME");
    pod.update(|status| status.monitor.as_mut().unwrap().start_time += 1).unwrap();
    store.reserve(&spec("web")).unwrap();
    assert_eq!(store.pods().unwrap().len(), 1);
}

#[test]
fn rename_takes_only_a_free_name() {
    let (_dir, store) = store();
    let a = store.reserve(&spec("a")).unwrap();
    store.reserve(&spec("b")).unwrap();
    assert_eq!(store.rename(&a, "b").unwrap_err().code(), "E-NAME");
    store.rename(&a, "c").unwrap();
    assert_eq!(store.pod("c").unwrap().id(), a.id());
}

#[test]
fn names_and_ids() {
    for good in ["a", "A-b_c.9", "0x"] {
        check_name(good).unwrap();
    }
    for bad in ["", "-a", ".a", "a/b", "a b", "é", &"x".repeat(64)] {
        assert_eq!(check_name(bad).unwrap_err().code(), "E-USAGE", "{bad}");
    }
    check_id("0123456789ab").unwrap();
    for bad in ["", "../../../etc", "0123456789AB", "0123456789abc"] {
        assert!(check_id(bad).is_err());
    }
}

#[test]
fn what_a_killed_restore_put_aside_comes_back() {
    let (_dir, store) = store();
    let spec = spec("web");
    let pod = store.reserve(&spec).unwrap();
    let mut status = Status::creating().unwrap();
    (status.state, status.started) = (State::Exited, Some(1));
    pod.set_status(&status).unwrap();
    // Nobody has the largest pid.
    let aside = store.data().join(format!(".aside-{}-4194304", spec.id));
    fs::rename(pod.dir(), &aside).unwrap();
    store.sweep().unwrap();
    assert_eq!(pod.status().unwrap().state, State::Exited, "it is back");
    assert!(!aside.exists());

    // Whoever restores lives while it makes the new folder, and is killed after.
    let living = store.data().join(format!(".aside-{}-{}", spec.id, std::process::id()));
    fs::rename(pod.dir(), &living).unwrap();
    store.reserve(&spec).unwrap();
    fs::rename(&living, &aside).unwrap();
    store.sweep().unwrap();
    assert!(aside.exists(), "the restore goes on");
    pod.update(|status| (status.state, status.started) = (State::Exited, Some(2))).unwrap();
    store.sweep().unwrap();
    assert_eq!(pod.status().unwrap().started, Some(2), "the restored one stays");
    assert!(!aside.exists());

    // Removed before anybody swept.
    fs::create_dir(&aside).unwrap();
    store.forget_aside(&pod).unwrap();
    assert!(!aside.exists());
}

/// A pod whose folder says that it was being created by somebody who is gone, in this boot or another.
fn half_made(store: &Store, this_boot: bool, job: Option<&str>) -> Pod {
    let pod = store.reserve(&spec(&new_id().unwrap())).unwrap();
    pod.update(|status| {
        status.monitor.as_mut().unwrap().start_time += 1;
        status.job = job.map(str::to_owned);
        if !this_boot {
            status.boot_id = "another".into();
        }
    })
    .unwrap();
    pod
}

#[test]
fn a_restored_pod_that_stands_still_is_swept_until_it_may_have_spoken() {
    let (_dir, store) = store();
    let init = crate::status::ProcessKey::myself().unwrap();
    for let_go in [false, true] {
        let pod = half_made(&store, true, None);
        pod.update(|status| {
            (status.init, status.let_go, status.started) = (Some(init), let_go, let_go.then_some(1));
        })
        .unwrap();
        assert!(pod.status().unwrap().monitor_lost);
        store.sweep().unwrap();
        assert_eq!(pod.dir().exists(), let_go);
    }
}

#[test]
fn what_a_power_cut_may_have_hidden_is_not_swept() {
    let (_dir, store) = store();
    let wrote = |pod: &Pod| fs::write(pod.upper_dir().join("file"), "the only copy").unwrap();
    // In the same boot the status is the last word.
    let failed = half_made(&store, true, None);
    wrote(&failed);
    store.sweep().unwrap();
    assert!(!failed.dir().exists());
    // In another it may be from before the pod ran.
    let ran = half_made(&store, false, None);
    wrote(&ran);
    store.sweep().unwrap();
    assert!(ran.dir().exists());
    let logged = half_made(&store, false, None);
    fs::write(logged.log_path(), "said").unwrap();
    store.sweep().unwrap();
    assert!(logged.dir().exists());
    let torn = half_made(&store, true, None);
    wrote(&torn);
    for left in ["", "{\"state\": \"run"] {
        fs::write(torn.dir().join("status.json"), left).unwrap();
        store.sweep().unwrap();
        assert!(torn.dir().exists() && torn.status().unwrap().state == State::Dead);
    }
    // Nor is one of another version of pod taken for dead.
    fs::write(torn.dir().join("status.json"), "{\"state\": \"dreaming\"}").unwrap();
    store.sweep().unwrap();
    assert!(torn.dir().exists() && torn.status().is_err());
    let blank = half_made(&store, false, None);
    store.sweep().unwrap();
    assert!(!blank.dir().exists());
}

#[test]
fn what_the_journal_says_has_arrived_is_not_swept() {
    let (_dir, store) = store();
    let jobs = store.jobs_dir().unwrap();
    for (job, phase, stays) in [("0001", "running", true), ("0002", "receiving", false), ("0003", "aborted", false)] {
        fs::write(jobs.join(format!("{job}.json")), format!("{{\"phase\": \"{phase}\"}}")).unwrap();
        let pod = half_made(&store, true, Some(job));
        store.sweep().unwrap();
        assert_eq!(pod.dir().exists(), stays, "{phase}");
    }
    let unknown = half_made(&store, true, Some("0004"));
    store.sweep().unwrap();
    assert!(!unknown.dir().exists());
}

#[test]
fn the_monitor_of_an_ended_pod_is_waited_for() {
    let (_dir, store) = store();
    let pod = store.reserve(&spec("web")).unwrap();
    let mut monitor = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
    let key = status::ProcessKey::of(monitor.id() as i32).unwrap();
    pod.update(|status| (status.state, status.monitor) = (State::Exited, Some(key))).unwrap();
    assert!(!lifecycle::monitor_leaves_within(&pod, std::time::Duration::from_millis(1)).unwrap());
    drop(monitor.stdin.take());
    assert!(lifecycle::monitor_leaves_within(&pod, std::time::Duration::from_secs(60)).unwrap());
    assert!(!key.alive());
    monitor.wait().unwrap();
    assert!(lifecycle::monitor_leaves_within(&pod, std::time::Duration::ZERO).unwrap());
}

#[test]
fn what_is_buried_is_not_what_came_back() {
    let (_dir, store) = store();
    let pod = store.reserve(&spec("web")).unwrap();
    let file = pod.upper_dir().join("file");
    fs::write(&file, "of the copy that left").unwrap();
    fs::write(pod.log_path(), "said").unwrap();
    let cleared = pod.clear().unwrap();
    assert!(!file.exists() && !pod.log_path().exists() && !pod.run_dir().exists());
    pod.update(|status| status.state = State::Moved).unwrap();
    // It is here again before the last of it has gone.
    let spec = Spec { id: pod.id().to_owned(), ..spec("web") };
    let back = store.reserve(&spec).unwrap();
    fs::write(&file, "of the copy that came back").unwrap();
    cleared.remove().unwrap();
    assert_eq!(fs::read_to_string(file).unwrap(), "of the copy that came back");
    assert!(back.dir().exists());
    assert_eq!(
        fs::read_dir(store.data())
            .unwrap()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with(".removed"))
            .count(),
        0
    );
}

#[test]
fn what_could_not_be_written_leaves_nothing_beside() {
    let dir = tempfile::tempdir().unwrap();
    // A folder with something in it is not replaced by a file.
    let path = dir.path().join("it.json");
    fs::create_dir_all(path.join("in")).unwrap();
    for written in [write_json(&path, &1), write_json_quickly(&path, &1)] {
        written.unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
