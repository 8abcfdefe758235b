//! For tests: the least that there is of a thing, of which a test says what it is about.

use crate::spec::{Base, Network, NetworkMode, Process, Resources, Root, Seccomp, Security, Spec, User, VERSION};

/// A pod without rights, network and volumes, on the host's own files.
pub fn spec(id: &str, name: &str) -> Spec {
    let process = Process {
        args: vec!["true".into()],
        env: vec![],
        cwd: "/".into(),
        user: User::default(),
        terminal: false,
        interactive: false,
        init: false,
        no_new_privileges: false,
        rlimits: vec![],
        oom_score_adj: None,
    };
    let network = Network {
        mode: NetworkMode::None,
        addresses: vec![],
        gateways: vec![],
        mac: None,
        mtu: None,
        dns: vec![],
        ports: vec![],
    };
    Spec {
        version: VERSION,
        id: id.into(),
        name: name.into(),
        created: 1,
        hostname: "h".into(),
        process,
        root: Root { base: Base::Host, read_only: false },
        volumes: vec![],
        network,
        resources: Resources::default(),
        security: Security { privileged: false, capabilities: vec![], seccomp: Seccomp::Default },
        devices: vec![],
        labels: Default::default(),
        auto_remove: false,
        stop_signal: 15,
        stop_timeout: 10,
        log: Default::default(),
    }
}
