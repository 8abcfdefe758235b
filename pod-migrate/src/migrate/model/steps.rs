//! What can happen next: the steps of each who works on a move, in the order of the code that they stand for, and what
//! breaks.

use super::{BACK, Hand, Message, Monitor, OUT, Receiver, Rules, Slip, Status, There, Who, Word, World};

/// What can happen in one world.
pub struct Model {
    pub rules: Rules,
    /// So many faults at most, or any number.
    pub faults: Option<u8>,
    pub found: Vec<Step>,
}

pub struct Step {
    pub what: &'static str,
    pub is_fault: bool,
    pub to: World,
}

impl Model {
    pub fn steps(&mut self, w: &World) {
        self.tool(w);
        (0..3).for_each(|hand| self.settler(w, hand));
        self.receiver(w);
        self.monitor(w);
        self.sweep(w);
        self.comers(w);
        self.kills(w);
        self.crashes(w);
        self.later_jobs(w);
        for step in &mut self.found {
            // Those who come later are alike, and so is every link that nobody is at.
            step.to.hands[1..].sort_unstable();
            if step.to.ended == [true; 2] {
                step.to.cut = [false; 2];
            }
        }
    }

    fn step(&mut self, what: &'static str, w: &World, change: impl FnOnce(&mut World)) {
        let mut to = *w;
        change(&mut to);
        self.found.push(Step { what, is_fault: false, to });
    }

    fn fault(&mut self, what: &'static str, w: &World, change: impl FnOnce(&mut World)) {
        let mut to = *w;
        match self.faults {
            Some(most) if w.faults == most => return,
            // Without a limit worlds are alike however many faults led to them.
            limit => to.faults += u8::from(limit.is_some()),
        }
        change(&mut to);
        self.found.push(Step { what, is_fault: true, to });
    }

    /// A step of somebody at the source, and where he is then.
    fn goes(&mut self, what: &'static str, w: &World, hand: usize, to: Hand, change: impl FnOnce(&mut World)) {
        self.step(what, w, |w| {
            w.hands[hand] = to;
            change(w);
        });
    }

    /// A step of the new monitor.
    fn turns(&mut self, what: &'static str, w: &World, to: Monitor, change: impl FnOnce(&mut World)) {
        self.step(what, w, |w| {
            w.monitor = to;
            change(w);
        });
    }

    /// What is seen now, or else when the patience ends for nothing, which is a fault.
    fn perhaps(&mut self, seen: bool, what: &'static str, w: &World, change: impl FnOnce(&mut World)) {
        match seen {
            true => self.step(what, w, change),
            false => self.fault("Channel::wait: the other side takes too long", w, change),
        }
    }

    /// `pod migrate` up to the answer to COMMIT.
    fn tool(&mut self, w: &World) {
        let rules = self.rules;
        let heard = w.queues[BACK][0];
        let failed = heard == Some(Message::Failed) || w.broken(BACK);
        let early = rules.slip(Slip::SaysBeforeItWrites);
        let write = |w: &mut World| w.entry = Word::Committing;
        let say = |w: &mut World| w.say(OUT, Message::Commit);
        match w.hands[0] {
            Hand::Offered if heard == Some(Message::Reserved) => {
                self.goes("Connected::reserve: RESERVED", w, 0, Hand::Reserved, |w| w.hear(BACK));
            }
            Hand::Offered => self.perhaps(failed, "Connected::reserve: no RESERVED comes", w, |w| w.quit(0)),
            Hand::Reserved => {
                self.goes("Connected::reserve: Journal::begin", w, 0, Hand::Copying, |w| w.entry = Word::Copying);
            }
            Hand::Copying => {
                self.goes("Copied::freeze: Journal::phase", w, 0, Hand::Freezing, |w| w.entry = Word::Frozen);
                self.gives_up(w, failed);
            }
            Hand::Freezing => self.goes("Capture::freeze: held by ptrace", w, 0, Hand::Holding, |w| w.held = true),
            Hand::Holding => self.goes("Frozen::send: SENT", w, 0, Hand::Sent, |w| w.say(OUT, Message::Sent)),
            Hand::Sent => {
                if heard == Some(Message::Ready) {
                    self.goes("Frozen::send: READY", w, 0, Hand::Ready, |w| w.hear(BACK));
                }
                self.gives_up(w, failed);
            }
            Hand::Ready | Hand::Stopping => {
                let first = w.hands[0] == Hand::Ready;
                let by_cgroup = first == rules.slip(Slip::FreezesBeforeItWrites);
                let (cgroup, status) = ("Still::stop_for_good: Cgroup::freeze", "Still::stop_for_good: status");
                let what = if by_cgroup { cgroup } else { status };
                let to = if first { Hand::Stopping } else { Hand::Stopped };
                self.goes(what, w, 0, to, |w| w.stop(by_cgroup, rules));
                if !first {
                    self.fault("Still::stop_for_good: Cgroup::freeze fails, go_on", w, |w| w.hands[0] = Hand::Looked);
                }
            }
            Hand::Stopped => {
                let first = if early { say } else { write };
                self.goes("commit: Journal::phase", w, 0, Hand::Written, first);
                self.fault("commit: Journal::phase fails, Still::resume", w, |w| w.hands[0] = Hand::Looked);
            }
            Hand::Written => self.goes("commit: COMMIT", w, 0, Hand::Said, if early { write } else { say }),
            Hand::Said => {
                match heard {
                    Some(Message::Running) => {
                        self.goes("Sent::commit: RUNNING, Still::moved", w, 0, Hand::Told(true), |w| w.hear(BACK));
                    }
                    Some(_) => self.goes("Sent::commit: FAILED, Still::resume", w, 0, Hand::Looked, |w| w.hear(BACK)),
                    None => {}
                }
                self.perhaps(w.broken(BACK), "Sent::commit: nothing is heard, Still::leave", w, |w| {
                    w.held = false;
                    w.hands[0] = if rules.slip(Slip::ResumesAtTimeout) { Hand::Looked } else { Hand::Asking };
                });
            }
            Hand::GivingUp => self.step("Journal::aborted: it runs on here", w, |w| {
                w.entry = Word::Aborted;
                w.quit(0);
            }),
            _ => {}
        }
    }

    /// The end of a move before the commit: dropping its phase lets the pod go.
    fn gives_up(&mut self, w: &World, failed: bool) {
        let dropped = |w: &mut World| (w.hands[0], w.held) = (Hand::GivingUp, false);
        self.perhaps(failed, "broken, not_restored: the pod is let go", w, dropped);
        self.fault("gave_up: a signal came, or it failed here: ABORT", w, |w| {
            dropped(w);
            w.say(OUT, Message::Abort);
        });
    }

    /// What is done at the source when somebody wants to know, or knows, how the job ended.
    fn settler(&mut self, w: &World, hand: usize) {
        let rules = self.rules;
        match w.hands[hand] {
            Hand::Look(who, seen) => self.look(w, hand, who, seen),
            // While the decision is written its lock is held.
            Hand::Asking if w.monitor == Monitor::Written => {}
            Hand::Asking if w.decision == Word::Torn && rules.slip(Slip::TornIsAnError) => {
                self.step("journal::ask: the entry cannot be read", w, |w| w.quit(hand));
            }
            Hand::Asking => {
                let mut asked = *w;
                if !rules.slip(Slip::AskingWritesNothing) {
                    asked.give_up(rules);
                }
                let unknown = w.decision == Word::Nothing && rules.slip(Slip::UnknownRan);
                let ran = unknown || asked.decision == Word::Running;
                self.goes("fate, journal::ask: it is asked", &asked, hand, Hand::Told(ran), |_| {});
            }
            Hand::Told(true) if w.is_buried() && !rules.slip(Slip::BuriesWhatCameBack) => {}
            Hand::Told(true) => {
                let due = matches!(w.status, Status::Migrating | Status::Dead) || rules.slip(Slip::BuriesWhatCameBack);
                let (to, here) = if due { (Hand::Burying, false) } else { (Hand::Closing(Word::Done), w.here) };
                self.goes("lifecycle::moved: the copy is killed", w, hand, to, |w| {
                    (w.here, w.frozen) = (here, w.frozen && here);
                });
            }
            Hand::Burying => {
                let (tombstone, next) = ("lifecycle::bury: the tombstone", Hand::Closing(Word::Done));
                self.goes(tombstone, w, hand, next, |w| (w.here, w.status) = (false, Status::Moved));
                self.fault("lifecycle::bury fails", w, |w| {
                    w.status = Status::Dead;
                    w.quit(hand);
                });
            }
            Hand::Told(false) => self.put_back(w, hand),
            Hand::Looked | Hand::GoingOn => self.go_on(w, hand),
            Hand::Closing(word) => {
                self.step("Journal::phase: the job is over", w, |w| {
                    // One that somebody else has ended stays ended.
                    w.entry = if w.entry.is_over() { w.entry } else { word };
                    w.quit(hand);
                });
                self.fault("Journal::phase fails at the end", w, |w| w.quit(hand));
            }
            _ => {}
        }
    }

    /// `put_back`, which holds `capture.lock` from its look on.
    fn put_back(&mut self, w: &World, hand: usize) {
        if w.status != Status::Migrating {
            self.goes("put_back: it is not held for this job", w, hand, Hand::Closing(Word::Aborted), |_| {});
        } else if !w.is_locked() || self.rules.slip(Slip::LooksThenActs) {
            self.goes("put_back: it is held for this job", w, hand, Hand::Looked, |_| {});
        }
    }

    fn go_on(&mut self, w: &World, hand: usize) {
        let first = w.hands[hand] == Hand::Looked;
        let thaws = first != self.rules.slip(Slip::WritesBeforeItThaws);
        let to = if first { Hand::GoingOn } else { Hand::Closing(Word::Aborted) };
        self.goes(if thaws { "go_on: Cgroup::thaw" } else { "go_on: status" }, w, hand, to, |w| {
            w.go_on(thaws);
            w.held &= first || hand != 0;
        });
        if !thaws {
            let aborts = hand == 0 && self.rules.slip(Slip::AbortsWhatIsHeld);
            self.fault("go_on fails: status", w, |w| match aborts {
                true => (w.hands[0], w.held) = (Hand::Closing(Word::Aborted), false),
                false => w.quit(hand),
            });
        }
    }

    /// `repair` and `resume`: the entry was read, and now it is seen whether its tool is alive.
    fn look(&mut self, w: &World, hand: usize, who: Who, seen: Word) {
        let rules = self.rules;
        let word = if rules.is_late(who) { seen } else { w.entry };
        if w.hands[0] != Hand::Gone || word.is_over() || word == Word::Nothing {
            return self.step("repair, resume: nothing is to be done", w, |w| w.quit(hand));
        }
        let committing = word == Word::Committing;
        if who == Who::Resume && !committing && w.entry == Word::Committing {
            let says = |w: &mut World| w.said_here = true;
            return self.goes("resume: repair has returned: \"runs here\"", w, hand, Hand::Gone, says);
        }
        let down = matches!(w.status, Status::Dead | Status::Moved);
        if down && !committing && rules.slip(Slip::ReadsOldEntries) {
            return self.put_back(w, hand);
        }
        let unknown = w.status == Status::Dead || (committing && w.status == Status::Migrating);
        let gone = committing && w.status != Status::Migrating && rules.slip(Slip::NotMigratingIsMoved);
        match who {
            Who::Resume if committing || unknown => self.goes("resume: settle", w, hand, Hand::Asking, |_| {}),
            _ if gone || w.status == Status::Moved => {
                self.goes("repair: it was buried", w, hand, Hand::Closing(Word::Done), |_| {});
            }
            _ if unknown => self.step("repair: pending", w, |w| w.quit(hand)),
            _ => self.put_back(w, hand),
        }
    }

    /// `pod receive`
    fn receiver(&mut self, w: &World) {
        let rules = self.rules;
        let leave = |w: &mut World| {
            w.receiver = Receiver::Gone;
            w.end(BACK);
        };
        match w.receiver {
            Receiver::Waiting if w.queues[OUT][0].is_none() => {
                self.perhaps(w.broken(OUT), "arrive: no OFFER comes", w, leave);
            }
            Receiver::Waiting => self.step("arrive: OFFER, Journal::begin", w, |w| {
                w.hear(OUT);
                (w.decision, w.receiver) = (Word::Receiving, Receiver::Begun);
            }),
            Receiver::Begun => self.turns("monitor::spawn", w, Monitor::Fresh, |w| w.receiver = Receiver::Spawned),
            Receiver::Spawned if w.monitor == Monitor::Gone => {
                self.step("arrived::settle: the monitor is gone, Journal::give_up", w, |w| {
                    w.give_up(rules);
                    w.receiver = Receiver::Settling;
                });
            }
            Receiver::Spawned if w.monitor == Monitor::Serving => {
                self.step("spawn: the pod runs", w, |w| w.receiver = Receiver::Gone);
            }
            Receiver::Settling => self.step("arrived::settle: as the journal says", w, |w| {
                w.make_true(rules);
                w.receiver = Receiver::Gone;
            }),
            _ => {}
        }
    }

    /// `Arriving`, in the new monitor.
    fn monitor(&mut self, w: &World) {
        let rules = self.rules;
        let heard = w.queues[OUT][0];
        match w.monitor {
            Monitor::Fresh => {
                self.turns("Arriving::files: RESERVED", w, Monitor::Files, |w| w.say(BACK, Message::Reserved));
            }
            Monitor::Files if heard == Some(Message::Sent) => {
                self.turns("arrival::restore: SENT", w, Monitor::Filled, |w| {
                    w.hear(OUT);
                    w.there = There::Filled;
                });
            }
            Monitor::Filled => self.turns("Restored::outlive", w, Monitor::Outliving, |w| {
                w.there = if rules.slip(Slip::DiesWithItsMonitor) { There::Filled } else { There::Held };
            }),
            Monitor::Outliving => {
                self.turns("await_commit: READY", w, Monitor::Waiting, |w| w.say(BACK, Message::Ready));
            }
            Monitor::Waiting if heard == Some(Message::Commit) => self.commit(w),
            Monitor::Written => {
                self.turns("Journal::write_running: flushed", w, Monitor::Decided, |w| w.synced = true);
                self.fault("Journal::write_running fails", w, |w| {
                    (w.decision, w.monitor) = (Word::Receiving, Monitor::Failing);
                });
            }
            Monitor::Decided => self.turns("let_go: the tasks run", w, Monitor::LetGo, World::let_go),
            Monitor::LetGo => self.turns("let_go: written, RUNNING", w, Monitor::Serving, |w| {
                w.say(BACK, Message::Running);
                w.end(BACK);
            }),
            Monitor::Failing => {
                self.turns("Arriving::failed: Journal::decide, FAILED", w, Monitor::Removing, |w| {
                    w.give_up(rules);
                    w.say(BACK, Message::Failed);
                });
                self.fault("Arriving::failed: Journal::decide fails", w, |w| w.monitor = Monitor::Removing);
            }
            Monitor::Removing => self.step("monitor::spawn: end_it, lifecycle::remove", w, |w| {
                w.there = There::Gone;
                w.monitor_ends();
            }),
            _ => {}
        }
        if matches!(w.monitor, Monitor::Files | Monitor::Waiting) && !rules.slip(Slip::NeverGivesUp) {
            let over = heard == Some(Message::Abort) || w.broken(OUT) || w.decision == Word::Aborted;
            let what = "await_commit: ABORT, silence, the end or given_up";
            self.perhaps(over, what, w, |w| w.monitor = Monitor::Failing);
        }
    }

    fn commit(&mut self, w: &World) {
        let rules = self.rules;
        self.fault("await_commit: COMMIT, Journal::decide fails", w, |w| w.monitor = Monitor::Failing);
        self.step("await_commit: COMMIT, Journal::decide", w, |w| {
            w.hear(OUT);
            w.monitor = Monitor::Failing;
            if !w.decision.is_over() || rules.slip(Slip::LateCommitRuns) {
                (w.decision, w.decided) = (Word::Running, true);
                w.monitor = if rules.slip(Slip::RunsUnsynced) { Monitor::Decided } else { Monitor::Written };
            }
        });
    }

    /// `repair` by any command at the destination, and `pod job abort` there.
    fn sweep(&mut self, w: &World) {
        let rules = self.rules;
        // A monitor that has not yet taken over is not known.
        let orphaned = matches!(w.monitor, Monitor::Gone | Monitor::Fresh) && w.receiver == Receiver::Gone;
        let left = match w.decision {
            Word::Receiving => orphaned,
            Word::Running => w.monitor == Monitor::Gone && w.there == There::Held,
            Word::Aborted => orphaned && w.there == There::Held && !rules.slip(Slip::LeavesTheAborted),
            _ => false,
        };
        if w.sweeping {
            self.step("repair: arrived::settle, as the journal says", w, |w| {
                w.make_true(rules);
                w.sweeping = false;
            });
            self.fault("kill -9: who repairs at the destination", w, |w| w.sweeping = false);
        } else if left {
            self.step("repair: arrived::settle, Journal::give_up", w, |w| {
                w.give_up(rules);
                w.sweeping = true;
            });
        } else if w.decision == Word::Receiving {
            self.fault("abort, supersede: Journal::give_up", w, |w| w.give_up(rules));
        }
    }

    /// Somebody comes to the source. Where nobody works on a job that is not over, that is what has to be; at another
    /// moment it is a fault.
    fn comers(&mut self, w: &World) {
        let Some(free) = (1..3).find(|hand| w.hands[*hand] == Hand::Gone) else { return };
        if w.entry.is_over() || w.entry == Word::Nothing {
            return;
        }
        let due = w.hands == [Hand::Gone; 3];
        for (who, what) in [(Who::Ps, "repair: the entry is read"), (Who::Resume, "resume: the entry is read")] {
            // What counts no more is forgotten, so that worlds are alike.
            let seen = if self.rules.is_late(who) { w.entry } else { Word::Nothing };
            let comes = |w: &mut World| w.hands[free] = Hand::Look(who, seen);
            if due { self.step(what, w, comes) } else { self.fault(what, w, comes) }
        }
    }

    fn kills(&mut self, w: &World) {
        for hand in (0..3).filter(|hand| w.hands[*hand] != Hand::Gone) {
            let later = "kill -9: who settles the job, or what it waits for is lost";
            self.fault(if hand == 0 { "kill -9: pod migrate" } else { later }, w, |w| w.quit(hand));
        }
        if w.receiver != Receiver::Gone {
            self.fault("kill -9: pod receive", w, |w| {
                if matches!(w.receiver, Receiver::Waiting | Receiver::Begun) {
                    w.end(BACK);
                }
                w.receiver = Receiver::Gone;
            });
        }
        if !matches!(w.monitor, Monitor::Gone | Monitor::Serving) {
            self.fault("kill -9: the new monitor", w, |w| {
                if w.there == There::Filled {
                    w.there = There::Gone;
                }
                w.monitor_ends();
            });
        }
        for (way, what) in [(OUT, "the link breaks on the way out"), (BACK, "the link breaks on the way back")] {
            if !w.cut[way] && w.ended != [true; 2] {
                self.fault(what, w, |w| (w.cut[way], w.queues[way]) = (true, [None; 2]));
            }
        }
    }

    /// Power cuts. What is on its way to the other host may still arrive.
    fn crashes(&mut self, w: &World) {
        let remains = if w.kept { vec![Word::Done] } else { w.entry.remains(true) };
        for entry in remains {
            self.fault("the source's host goes down", w, |w| {
                w.hands = [Hand::Gone; 3];
                w.end(OUT);
                w.lost |= w.here;
                (w.here, w.held, w.frozen, w.entry) = (false, false, false, entry);
                w.status = if w.status == Status::Moved { Status::Moved } else { Status::Dead };
            });
        }
        let remains = if w.synced { vec![Word::Running] } else { w.decision.remains(false) };
        for decision in remains {
            self.fault("the destination's host goes down", w, |w| {
                w.lost |= w.there == There::Runs || decision == Word::Running;
                (w.receiver, w.sweeping, w.there) = (Receiver::Gone, false, There::Gone);
                w.monitor_ends();
                (w.decision, w.synced) = (decision, decision == Word::Running);
            });
        }
    }

    /// What comes after the move, for somebody who is slow in between.
    fn later_jobs(&mut self, w: &World) {
        let rules = self.rules;
        let idle = matches!(w.monitor, Monitor::Gone | Monitor::Serving) && w.there != There::Held;
        if w.decision == Word::Running && idle && rules.slip(Slip::ForgetsWhatRan) {
            self.fault("forget_old: a week has passed", w, |w| (w.decision, w.synced) = (Word::Nothing, false));
        }
        // In the HELLO of a later job.
        if w.entry == Word::Done && w.hands[0] == Hand::Gone && !w.kept && !rules.slip(Slip::TellsTheUnsynced) {
            self.step("journal::settled: flushed", w, |w| w.kept = true);
        }
        let told = w.kept || (w.entry == Word::Done && rules.slip(Slip::TellsTheUnsynced));
        if told && w.decision == Word::Running && idle {
            self.step("journal::forget: the source knows", w, |w| (w.decision, w.synced) = (Word::Nothing, false));
        }
        let locked = w.hands[0] != Hand::Gone || (w.is_locked() && !rules.slip(Slip::LooksThenActs));
        let nothing_there = idle && w.receiver == Receiver::Gone && w.there == There::Gone;
        if w.here && !w.frozen && w.status == Status::Running && !locked && nothing_there && !w.ran {
            self.fault("pod migrate, again: the pod runs there", w, |w| {
                w.give_up(rules);
                (w.status, w.frozen, w.again) = (Status::Again, true, true);
                w.let_go();
            });
        }
        if w.status == Status::Again {
            self.step("pod migrate, again: the copy is buried", w, |w| {
                (w.here, w.frozen, w.status) = (false, false, Status::Moved);
            });
        }
        // `pod receive` repairs first: only a tool that is still alive can have left its entry open by then.
        let open = !w.entry.is_over() && w.hands[0] == Hand::Gone;
        if w.status == Status::Dead && w.there == There::Runs && idle && w.hands[0] == Hand::Gone && !w.is_buried() {
            self.fault("pod migrate, back, over what a power cut left: it_left", w, |w| {
                (w.here, w.frozen, w.status, w.again) = (true, false, Status::Running, true);
                (w.there, w.ran, w.lost) = (There::Gone, false, false);
                // One that is gone, or over, is as it was.
                if !w.entry.is_over() && w.entry != Word::Nothing {
                    w.entry = Word::Done;
                }
            });
        }
        if w.status == Status::Moved && w.there == There::Runs && idle && !open {
            self.fault("pod migrate, back: the pod runs here again", w, |w| {
                (w.here, w.frozen, w.status, w.again) = (true, false, Status::Running, true);
                (w.there, w.ran) = (There::Gone, false);
            });
        }
    }
}
