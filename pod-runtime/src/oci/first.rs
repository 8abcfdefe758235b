//! The first process of a container, from the clone to the moment when it becomes the user's program.
//!
//! It builds its own inside, says so, and then keeps nothing but its stdio, what was to be preserved, and a listening
//! socket in the container's folder: whoever connects there and sends a letter starts it, and hears over the same
//! connection why it could not be, or that it closed at the exec. Until that exec nothing inside the container can trace
//! it or look at its descriptors. When its maker dies first, it ends.

use super::bundle::{self, Bundle};
use super::mounts::{self, Plan as Mounts};
use super::namespaces::Plan as Namespaces;
use super::store::{Shown, Status};
use super::{confine, devices, hooks, listener, terminal};
use crate::cgroup::{self, Cgroup};
use crate::init;
use crate::namespaces::Settings;
use crate::problem::{Doing, Problem, Report, Result};
use crate::rootfs::{self, special, tree::Tree};
use crate::security::seccomp::Filter;
use crate::security::user;
use crate::spec::Base;
use crate::sys::mount::{self, Change, MOUNT_ATTR_RDONLY};
use crate::sys::{clone, daemon, process, tty, unix};
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, Gid, Uid, faccessat, fchdir, setresgid, setresuid};
use oci_spec::runtime::{Hooks, Linux, Process};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Go on; the host's number of the process follows once.
pub const GO: u8 = b'g';

/// What the process says to its maker, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// The file tree stands and is not the root yet: time for the hooks of the runtime.
    Built,
    /// It waits to be started.
    Ready,
    Problem(Report),
}

/// All that the process needs; it has its own copy of its maker's memory.
#[derive(Debug)]
pub struct First<'a> {
    pub bundle: &'a Bundle,
    pub shown: Shown,
    pub namespaces: &'a Namespaces,
    /// The container's root, detached, and what is mounted in it; none when the process is to take them itself.
    pub taken: Option<(OwnedFd, Mounts)>,
    pub rootfs: &'a Path,
    /// To be entered, and where the process was born; none when it is put there, or has none.
    pub enter: Option<(&'a Cgroup, cgroup::Born)>,
    pub cgroup: Option<&'a Cgroup>,
    pub sync: UnixStream,
    pub start: &'a UnixListener,
    /// Who gets the terminal.
    pub console: Option<&'a UnixStream>,
    /// Who gets the listener of the seccomp filter.
    pub listener: Option<&'a UnixStream>,
    pub filter: Option<&'a Filter>,
    pub no_pivot: bool,
    pub new_keyring: bool,
    pub preserve_fds: i32,
    /// Its maker could not be looked at any more when it was made, and so it never could. Nothing inside can tell: in a
    /// user namespace that has no maps yet everybody is nobody.
    pub hidden: bool,
}

impl First<'_> {
    /// The life of the process.
    pub fn live(mut self) -> ! {
        let program = match self.prepare() {
            Ok(program) => program,
            Err(problem) => {
                let _ = self.say(&News::Problem(problem.report()));
                daemon::exit_now(1)
            }
        };
        let (sync, listening) = (self.sync.as_raw_fd(), self.start.as_raw_fd());
        let own = [sync, listening, program.launcher.as_raw_fd()];
        let keep: Vec<i32> = (3..3 + self.preserve_fds).chain(own).collect();
        daemon::close_all_but(&keep);
        // Without a maker nobody has written down that it waits, and nobody would start it.
        if self.say(&News::Ready).is_err() {
            daemon::exit_now(1)
        }
        // The maker waits for it.
        daemon::close_number(sync);
        loop {
            let Ok((mut starter, _)) = self.start.accept() else { daemon::exit_now(1) };
            let mut letter = [0];
            // One that dies before it says so has not started it.
            if starter.read_exact(&mut letter).is_err() || letter != [GO] {
                continue;
            }
            let problem = match self.become_program(&program, &starter) {
                Err(problem) => problem,
                Ok(never) => match never {},
            };
            let _ = starter.write_all(problem.chain().as_bytes());
            daemon::exit_now(init::exit_code(&problem))
        }
    }

    fn linux(&self) -> &Linux {
        self.bundle.spec.linux().as_ref().expect("a bundle without one gets an empty one before it comes here")
    }

    fn process(&self) -> &Process {
        self.bundle.spec.process().as_ref().expect("a bundle is checked for it when it is read")
    }

    fn say(&mut self, news: &News) -> Result<()> {
        let mut line = serde_json::to_vec(news).doing(|| "write to the runtime".into())?;
        line.push(b'\n');
        unix::send(self.sync.as_fd(), &line, &[], &[], None).doing(|| "write to the runtime".into()).map(drop)
    }

    /// Waits for the letter; ends with the maker.
    fn wait(&mut self) {
        let mut heard = [0];
        if self.sync.read_exact(&mut heard).is_err() || heard != [GO] {
            daemon::exit_now(1);
        }
    }

    fn prepare(&mut self) -> Result<Program> {
        // To a maker that is an ordinary user it must be visible until that has written the maps. For others once more: to
        // join a user namespace has made it visible.
        if self.hidden || !self.namespaces.has_new(libc::CLONE_NEWUSER) {
            process::set_dumpable(false).doing(|| "hide from the container's processes".into())?;
        }
        let other_user = self.namespaces.has_user();
        if !other_user {
            self.enter_namespaces()?;
        }
        self.wait();
        let mut pid = [0; 4];
        self.sync.read_exact(&mut pid).doing(|| "hear from the runtime".into())?;
        self.shown.pid = i32::from_ne_bytes(pid);
        self.shown.status = Status::Creating;
        if let Some((cgroup, born)) = self.enter {
            cgroup.enter(born)?;
        }
        if other_user {
            self.become_its_root()?;
            self.enter_namespaces()?;
        }
        if self.namespaces.has_new(libc::CLONE_NEWCGROUP) {
            clone::unshare(libc::CLONE_NEWCGROUP).doing(|| "make a cgroup namespace".into())?;
        }
        self.namespaces.join_mounts()?;
        self.furnish()?;
        // Before anything of the container's is looked up by a path: no descriptor of the host is there to be found.
        // Objects that own one are not dropped any more.
        let other = [Some(self.sync.as_raw_fd()), Some(self.start.as_raw_fd()), self.listener.map(AsRawFd::as_raw_fd)];
        let keep: Vec<i32> = (3..3 + self.preserve_fds).chain(other.into_iter().flatten()).collect();
        daemon::close_all_but(&keep);
        let linux = self.linux();
        confine::prepare(self.process(), linux.personality().as_ref(), linux.memory_policy().as_ref())?;
        confine::can_give(self.process())?;
        enter_folder(self.process())?;
        let program = Program::find(self.process())?;
        listener::hand_over(self.filter, self.listener, self.process(), self.linux(), (&self.shown, self.shown.pid))?;
        Ok(program)
    }

    /// The file tree, from the first mount to being the root.
    fn furnish(&mut self) -> Result<()> {
        let taken = self.taken.take();
        let new_mounts = self.namespaces.has_new(libc::CLONE_NEWNS);
        if new_mounts {
            self.part_from_the_host()?;
        }
        let (root, mounts) = match taken {
            Some(taken) => taken,
            None => (mounts::root(self.rootfs)?, Mounts::open(&self.bundle.spec, &self.bundle.folder)?),
        };
        let (tree, to_protect) =
            if new_mounts { self.build(root, &mounts)? } else { (Tree::at(self.rootfs)?, Vec::new()) };
        let own_dev = new_mounts && mounts.has_own_dev();
        let hooks = self.bundle.spec.hooks().clone().unwrap_or_default();
        self.say(&News::Built)?;
        self.wait();
        hooks::run("createContainer", hooks.create_container(), &self.shown)?;
        let terminal = self.make_terminal(&tree, own_dev)?;
        self.protect(&tree, &to_protect)?;
        self.become_root(&tree)?;
        if let Some(terminal) = terminal {
            take_terminal(&terminal)?;
        }
        Ok(())
    }

    /// Whoever else this is outside, inside its user namespace it is root.
    fn become_its_root(&self) -> Result<()> {
        let none: &[Gid] = &[];
        let _ = nix::unistd::setgroups(none);
        setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)).doing(|| "become the group root".into())?;
        setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).doing(|| "become root".into())?;
        // The change of user has made it visible.
        process::set_dumpable(false).doing(|| "hide from the container's processes".into())
    }

    fn enter_namespaces(&self) -> Result<()> {
        self.namespaces.join_the_rest()?;
        if self.namespaces.has_new(libc::CLONE_NEWNET) {
            clone::unshare(libc::CLONE_NEWNET).doing(|| "make a network namespace".into())?;
        }
        nix::unistd::setsid().doing(|| "begin a session".into())?;
        if self.new_keyring {
            // A kernel without keyrings has none to keep away.
            let _ = process::new_session_keyring();
        }
        if self.namespaces.has_new(libc::CLONE_NEWNET) {
            process::loopback_up().doing(|| "bring the loopback device up".into())?;
        }
        if let Some(name) = self.bundle.spec.hostname().as_ref().filter(|name| !name.is_empty()) {
            nix::unistd::sethostname(name).doing(|| format!("set the host name {name}"))?;
        }
        if let Some(name) = self.bundle.spec.domainname().as_ref().filter(|name| !name.is_empty()) {
            process::set_domain_name(name).doing(|| format!("set the domain name {name}"))?;
        }
        let settings = self.linux().sysctl().iter().flatten();
        let mut proc = None;
        for (name, value) in settings {
            if proc.is_none() {
                proc = Some(rootfs::proc()?);
            }
            let proc = proc.as_ref().expect("it was just made");
            Settings { proc }.write(&bundle::setting(name), value)?;
        }
        Ok(())
    }

    /// What is mounted from here on is not to be seen outside.
    fn part_from_the_host(&self) -> Result<()> {
        let none: Option<&str> = None;
        let kind = if self.propagation() == libc::MS_PRIVATE { MsFlags::MS_PRIVATE } else { MsFlags::MS_SLAVE };
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | kind, none)
            .doing(|| "keep the container's mounts from the host".into())
    }

    /// Of mounts that come from the host.
    fn propagation(&self) -> u64 {
        match self.linux().rootfs_propagation().as_deref() {
            Some("private" | "rprivate" | "unbindable" | "runbindable") => libc::MS_PRIVATE,
            _ => libc::MS_SLAVE,
        }
    }

    /// The file tree, by descriptors; with it what is to be made read-only when all is in it.
    fn build(&self, root: OwnedFd, mounts: &Mounts) -> Result<(Tree, Vec<OwnedFd>)> {
        mounts::attach_root(&root, self.rootfs, self.propagation())?;
        let tree = Tree::of(root);
        nix::sys::stat::umask(Mode::empty());
        let cgroup_namespace = mounts::cgroup_namespace(&self.bundle.spec);
        let to_protect = mounts.mount(&tree, self.cgroup, cgroup_namespace)?;
        if mounts.has_own_dev() {
            let devices = self.linux().devices().as_deref().unwrap_or_default();
            devices::fill(&tree, devices, self.namespaces.has_user())?;
        }
        nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
        Ok((tree, to_protect))
    }

    fn make_terminal(&self, tree: &Tree, own_dev: bool) -> Result<Option<OwnedFd>> {
        let Some(console) = self.console else { return Ok(None) };
        let made = terminal::make(tree, self.process())?;
        if own_dev {
            devices::console(tree, &made.slave)?;
        }
        terminal::send(console, &made.master)?;
        Ok(Some(made.slave))
    }

    /// What lies over the kernel's files, and what is read-only: last, for all before it makes places to mount onto.
    fn protect(&self, tree: &Tree, made: &[OwnedFd]) -> Result<()> {
        if !self.namespaces.has_new(libc::CLONE_NEWNS) {
            return Ok(());
        }
        let linux = self.linux();
        let none = Vec::new();
        special::write_protect(tree, linux.readonly_paths().as_ref().unwrap_or(&none), 0)?;
        if let Some(paths) = linux.masked_paths().as_ref().filter(|paths| !paths.is_empty()) {
            special::mask(tree, &special::host_null()?, paths)?;
        }
        let change = Change { set: MOUNT_ATTR_RDONLY, ..Change::default() };
        for made in made {
            mount::change(made.as_fd(), &change, false).doing(|| "make a new file system read-only".into())?;
        }
        let read_only = self.bundle.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        if read_only {
            mount::change(tree.root().as_fd(), &change, false).doing(|| "make the root read-only".into())?;
        }
        Ok(())
    }

    /// The host's tree is gone after it.
    fn become_root(&self, tree: &Tree) -> Result<()> {
        let doing = || "make the container's root the root".to_owned();
        fchdir(tree.root()).doing(doing)?;
        if !self.namespaces.has_new(libc::CLONE_NEWNS) {
            nix::unistd::chroot(".").doing(doing)?;
            return nix::unistd::chdir("/").doing(doing);
        }
        if self.no_pivot {
            super::uncover::kernels_files(tree.root())?;
            let none: Option<&str> = None;
            nix::mount::mount(Some("."), "/", none, MsFlags::MS_MOVE, none).doing(doing)?;
            nix::unistd::chroot(".").doing(doing)?;
        } else {
            nix::unistd::pivot_root(".", ".").doing(doing)?;
            // The old root lies over the new one now.
            umount2(".", MntFlags::MNT_DETACH).doing(|| "let the host's tree go".into())?;
        }
        nix::unistd::chdir("/").doing(doing)?;
        let Some(text) = self.linux().rootfs_propagation().as_deref().filter(|text| !text.is_empty()) else {
            return Ok(());
        };
        let (propagation, all) = bundle::root_propagation(text)?;
        let change = Change { propagation, ..Change::default() };
        mount::change(tree.root().as_fd(), &change, all).doing(|| format!("make the root {text}"))
    }

    fn become_program(&self, program: &Program, starter: &UnixStream) -> Result<Infallible> {
        let hooks = Hooks::default();
        let hooks = self.bundle.spec.hooks().as_ref().unwrap_or(&hooks);
        let shown = Shown { status: Status::Created, ..self.shown.clone() };
        let has_hooks = hooks.start_container().as_ref().is_some_and(|hooks| !hooks.is_empty());
        let filter = self.filter.filter(|filter| !filter.notifies);
        program.settle(self.preserve_fds)?;
        // A hook must not have it: whatever it leaves running would keep who starts the container waiting.
        if !has_hooks {
            program.keep(starter)?;
        }
        confine::confine(self.process(), filter)?;
        // They are programs of the image: with no more rights than the container's own.
        hooks::run("startContainer", hooks.start_container(), &shown)?;
        if has_hooks {
            program.keep(starter)?;
        }
        program.execute(starter)
    }
}

/// 0, 1 and 2 are the terminal, which controls the session.
pub fn take_terminal(terminal: &OwnedFd) -> Result<()> {
    tty::set_controlling_terminal(terminal.as_fd()).doing(|| "take the terminal".into())?;
    (0..3).try_for_each(|number| daemon::replace_stdio(terminal.as_fd(), number).doing(|| "set up stdio".into()))
}

/// The working directory, made if it is not there, and verified to be inside the root.
pub fn enter_folder(process: &Process) -> Result<()> {
    init::go_to(process.cwd())
}

/// The user's program, found.
#[derive(Debug)]
pub struct Program {
    pub launcher: OwnedFd,
    texts: Vec<CString>,
    places: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// The caller is inside the container, in the working directory.
    pub fn find(process: &Process) -> Result<Program> {
        let args = process.args().as_deref().unwrap_or_default();
        let name = args.first().ok_or_else(|| super::wrong("args must not be empty"))?;
        let mut env = process.env().clone().unwrap_or_default();
        if !env.iter().any(|line| line.starts_with("HOME=")) {
            env.push(format!("HOME={}", home(process.user().uid())));
        }
        let mut refused = None;
        let mut found: Option<PathBuf> = None;
        for path in init::places(name, &env) {
            let flags = nix::fcntl::AtFlags::AT_EACCESS;
            match faccessat(nix::fcntl::AT_FDCWD, path.as_str(), AccessFlags::X_OK, flags) {
                Ok(()) if Path::new(&path).is_dir() => refused = refused.or(Some(Errno::EACCES)),
                Ok(()) => {
                    found = Some(path.into());
                    break;
                }
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        let Some(found) = found else { return Err(cannot_execute(name, refused)) };
        let text = |error| CString::new(cannot_execute(name, error).chain()).doing(|| "word a problem".into());
        let errors = [None, Some(Errno::EACCES), Some(Errno::ENOEXEC), Some(Errno::EINVAL)];
        Ok(Program {
            launcher: init::launcher()?,
            texts: errors.into_iter().map(text).collect::<Result<_>>()?,
            places: vec![CString::new(found.into_os_string().into_encoded_bytes()).doing(|| "use a path".into())?],
            args: init::strings(args, "argument")?,
            env: init::strings(&env, "environment variable")?,
        })
    }

    /// Settles that what is preserved stays open at the exec and nothing else. Before there is a filter that could deny
    /// it.
    pub fn settle(&self, preserve_fds: i32) -> Result<()> {
        (3..3 + preserve_fds).try_for_each(process::keep_at_exec).doing(|| "preserve descriptors".into())?;
        let first = u32::try_from(3 + preserve_fds).unwrap_or(3);
        process::close_on_exec_from(first).doing(|| "mark descriptors to close at exec".into())
    }

    /// `tell` stays open for the launcher, which closes it at the program's exec.
    pub fn keep(&self, tell: &impl AsFd) -> Result<()> {
        process::keep_at_exec(tell.as_fd().as_raw_fd()).doing(|| "keep a descriptor over exec".into())
    }

    /// Becomes it. `tell` hears why not, and closes at the exec.
    pub fn execute(&self, tell: &impl AsFd) -> Result<Infallible> {
        let (texts, tell) = (self.texts.clone(), tell.as_fd().as_raw_fd());
        init::launch(self.launcher.as_fd(), tell, texts, self.places.clone(), (&self.args, &self.env))
    }
}

fn home(uid: u32) -> String {
    let found = user::look_up(&Base::Host, &uid.to_string()).ok().and_then(|(_, home)| home);
    found.unwrap_or_else(|| "/".to_owned())
}

fn cannot_execute(name: &str, refused: Option<Errno>) -> Problem {
    match refused {
        None if name.contains('/') => {
            Problem::new("E-COMMAND-NOT-FOUND", format!("exec: \"{name}\": stat {name}: no such file or directory"))
        }
        None => Problem::new("E-COMMAND-NOT-FOUND", format!("exec: \"{name}\": executable file not found in $PATH")),
        Some(error) => {
            let why = match error {
                Errno::EACCES => "permission denied",
                Errno::ENOEXEC => "exec format error",
                _ => "the kernel refuses to execute it",
            };
            Problem::new("E-COMMAND-NOT-EXECUTABLE", format!("exec: \"{name}\": {why}"))
        }
    }
}
