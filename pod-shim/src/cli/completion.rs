//! `pod completion`: a script that teaches a shell the verbs and options.

use super::{Cli, Exit};
use crate::output;
use clap::CommandFactory;
use clap_complete::Shell;
use pod_runtime::Result;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  pod completion bash > /etc/bash_completion.d/pod\n  source <(pod completion zsh)")]
pub struct Args {
    /// bash, zsh or fish
    shell: Shell,
}

pub fn run(args: Args) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pod", &mut script);
    let script = String::from_utf8_lossy(&script);
    output::data(&with_names(args.shell, &script))?;
    Ok(Exit::OK)
}

/// Verbs that are followed by names of pods.
const VERBS: &str = "attach check cp exec inspect kill logs migrate pause port rename rm stats stop top unpause wait";

/// The generated scripts know verbs and options; the names of pods are asked for when tab is pressed.
fn with_names(shell: Shell, script: &str) -> String {
    const ASK: &str = "pod ps -a --format name 2>/dev/null";
    match shell {
        Shell::Bash => format!(
            "{script}
_pod_with_names() {{
    _pod \"$@\"
    local cur=\"${{COMP_WORDS[COMP_CWORD]}}\" word
    [[ $cur == -* ]] && return
    for word in \"${{COMP_WORDS[@]:1:COMP_CWORD-1}}\"; do
        case \" {VERBS} \" in
            *\" $word \"*) COMPREPLY=($(compgen -W \"$({ASK})\" -- \"$cur\")); return ;;
        esac
    done
}}
complete -F _pod_with_names -o bashdefault -o default pod
"
        ),
        Shell::Zsh => {
            let named = script
                .replace(":pod -- Name or id of the pod:_default", ":pod -- Name or id of the pod:_pod_names")
                .replace(":pods -- Names or ids:_default", ":pods -- Names or ids:_pod_names");
            named.replacen(
                "autoload -U is-at-least",
                &format!("autoload -U is-at-least\n\n_pod_names() {{ compadd -- ${{(f)\"$({ASK})\"}} }}"),
                1,
            )
        }
        Shell::Fish => {
            format!("{script}\ncomplete -c pod -n \"__fish_seen_subcommand_from {VERBS}\" -f -a \"({ASK})\"\n")
        }
        _ => script.to_owned(),
    }
}
