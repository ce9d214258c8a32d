//! The command line: one file a command.

pub mod agent;
pub mod apply;
pub mod check;
pub mod cleanup;
pub mod controller;
pub mod dns;
pub mod explain;
pub mod flag_values;
#[cfg(test)]
mod golden;
pub mod keeper;
pub mod lock;
pub mod names;
pub mod notes;
pub mod options;
pub mod plan;
pub mod print;
pub mod record;
pub mod report;
pub mod session;
pub mod show;
pub mod signals;
pub mod uninstall;
pub mod watcher;

use std::{
    io::{ErrorKind, IsTerminal, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use options::Options;

use crate::state::State;

/// Service load balancing in the kernel: virtual IPs and published ports from one object.
#[derive(Parser, Debug)]
#[command(name = "meshlb", version, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub options: Options,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands whose flags are by default what the agent, or the last `apply`, ran with here.
const AS_THE_AGENT: [&str; 5] = ["show", "explain", "plan", "cleanup", "lock"];

const EXIT_CODES: &str = "\
Exit codes:
  0  done; for `plan`: nothing to change
  1  something failed, or a manifest is wrong: stderr says what, one line each
  2  `plan`: there are changes; any command: the command line is wrong";

/// Commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the node agent: follow a source and keep the kernel as it says
    Agent {
        /// Folder with MeshService and EndpointSlice YAML, or `kube` for the API server
        #[arg(long, env = "MESHLB_SOURCE", value_name = "DIR|kube")]
        source: String,
        /// Where a request to uninstall is looked for, in Kubernetes [default: the pod's own]
        #[arg(long, env = "MESHLB_NAMESPACE")]
        namespace: Option<String>,
    },
    /// Run the controller, in Kubernetes: give services their virtual IPs and published ports
    Controller {
        /// Where its Lease and the pool objects are [default: the pod's own]
        #[arg(long, env = "MESHLB_NAMESPACE")]
        namespace: Option<String>,
        /// Its name among controllers [default: host name and something random]
        #[arg(long, env = "MESHLB_IDENTITY")]
        identity: Option<String>,
    },
    /// Make the kernel as a folder says, once; beside an agent that follows it: wait until it is
    Apply {
        /// Folder with MeshService and EndpointSlice YAML
        dir: PathBuf,
    },
    /// Show every change that `apply` would make, and make none
    Plan {
        /// Folder [default: the one that was applied last, or that the agent runs with]
        dir: Option<PathBuf>,
        /// Output format
        #[arg(short, long, value_enum, default_value = "text")]
        output: Output,
    },
    /// Validate manifests as the API server would
    Check {
        /// Files or folders; `-` is standard input
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Show services with their VIPs, marks, endpoints and counters
    Show {
        /// `NAMESPACE/NAME` or `NAME`; all where it is left out
        name: Option<String>,
        /// Output format
        #[arg(short, long, value_enum, default_value = "text")]
        output: ShowOutput,
        /// Again every two seconds, until interrupted
        #[arg(short, long)]
        watch: bool,
    },
    /// Walk the path of a packet to a service and say at each hop whether the kernel is as it should be
    Explain {
        /// `NAMESPACE/NAME` or `NAME`
        name: String,
        /// Output format
        #[arg(short, long, value_enum, default_value = "text")]
        output: Output,
    },
    /// Write a folder's allocations to its meshlb.lock, so that every node given the folder agrees
    Lock {
        /// Folder with MeshService YAML
        dir: PathBuf,
    },
    /// Remove everything that meshlb ever programmed here, and nothing else
    Cleanup,
    /// Have all agents of a cluster clean up and hold off, and wait until they have
    Uninstall(uninstall::Arguments),
    /// Print the CustomResourceDefinitions
    Crd,
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Commands that no flag of [`Options`] means anything to.
const WITHOUT_SETTINGS: [&str; 3] = ["check", "crd", "completions"];

impl Command {
    fn has_settings(&self) -> bool {
        !matches!(self, Self::Check { .. } | Self::Crd | Self::Completions { .. })
    }
}

/// The command line as clap has it.
fn command() -> clap::Command {
    let mut command = Cli::command();
    let hidden: Vec<clap::Arg> =
        command.get_arguments().filter(|arg| arg.is_global_set()).map(|arg| arg.clone().hide(true)).collect();
    for name in WITHOUT_SETTINGS {
        command = command.mut_subcommand(name, |subcommand| subcommand.args(hidden.clone()));
    }
    command
}

/// Output formats.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs; the shape is documented in docs/cli.md.
    Json,
}

/// Output formats of `show`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ShowOutput {
    /// One line a service.
    Text,
    /// Every mark and endpoint.
    Wide,
    /// For programs; the shape is documented in docs/cli.md.
    Json,
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => {
            print::err(format_args!("{error:#}"));
            return ExitCode::from(2);
        }
    };
    let settings = if cli.command.has_settings() { cli.options.settings().map(drop) } else { Ok(()) };
    if let Err(error) = settings.and_then(|()| log_filter(&cli.options.log_level).map(drop)) {
        print::err(format_args!("{error:#}"));
        return ExitCode::from(2);
    }
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            print::err(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The command line, with the values of a --config file as defaults.
fn parse() -> anyhow::Result<Cli> {
    let first = command().ignore_errors(true).try_get_matches().unwrap_or_else(|e| end(&e));
    let file = first.get_one::<PathBuf>("config").cloned();
    let mut command = command();
    // Who looks, or cleans up, is not to repeat the agent's flags.
    let as_the_agent =
        |name: &str| AS_THE_AGENT.contains(&name) || name == "apply" && crate::instance::is_taken();
    if first.subcommand_name().is_some_and(as_the_agent)
        && let Some(dir) = first.get_one::<PathBuf>("state_dir")
        && let Ok(state) = State::peek(dir)
    {
        command = options::with_state(command, &state);
    }
    if let Some(file) = file {
        command = options::with_config_file(command, &file)?;
    }
    let matches = command.try_get_matches().unwrap_or_else(|e| end(&e));
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| end(&e));
    cli.options.remembered = options::remembered(&matches);
    Ok(cli)
}

/// Prints help, the version or what is wrong with the command line. (clap's own way to do so says nothing of a full disk.)
fn end(told: &clap::Error) -> ! {
    let code = match told.print().and_then(|()| std::io::stdout().flush()) {
        Err(e) if !told.use_stderr() && e.kind() != ErrorKind::BrokenPipe => {
            print::err(format_args!("standard output: {e}"));
            1
        }
        _ => told.exit_code(),
    };
    std::process::exit(code)
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let options = cli.options;
    match cli.command {
        Command::Agent { source, namespace } => agent::run(&options, &source, namespace),
        Command::Controller { namespace, identity } => controller::run(&options, namespace, identity),
        Command::Apply { dir } => apply::run(&options, &dir),
        Command::Plan { dir, output } => plan::run(&options, dir.as_deref(), output),
        Command::Check { files } => check::run(&files),
        Command::Show { name, output, watch } => show::run(&options, name.as_deref(), output, watch),
        Command::Explain { name, output } => explain::run(&options, &name, output),
        Command::Lock { dir } => lock::run(&options, &dir),
        Command::Cleanup => cleanup::run(&options),
        Command::Uninstall(arguments) => uninstall::run(&options, arguments),
        Command::Crd => {
            print::out(crate::api::crd::crds_yaml()?.map(|(_, text)| text).join("---\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            // It panics where it can't write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command(), "meshlb", &mut script);
            print::out(String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Logging of the agent.
///
/// # Errors
/// A level that is none.
pub fn log(options: &Options) -> anyhow::Result<()> {
    init_log(options, &options.log_level)
}

/// Logging of the commands that print their result themselves: warnings and worse, unless asked for more.
fn log_to_stderr(options: &Options) -> anyhow::Result<()> {
    let level = if options.log_level == "info" { "warn" } else { &options.log_level };
    init_log(options, level)
}

fn log_filter(level: &str) -> anyhow::Result<tracing_subscriber::EnvFilter> {
    // To EnvFilter any other word is a target, and everything else is silenced.
    let directive = |text: &str| {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        let level =
            text.rsplit_once('=').map_or(Some(text), |(target, level)| (!target.is_empty()).then_some(level));
        level.is_some_and(|level| LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)))
    };
    let directives: Vec<&str> = level.split(',').map(str::trim).collect();
    let asked = |target: &str| directives.iter().any(|text| text.starts_with(target));
    let mut all = directives.join(",");
    // The resolver's own complaints are about others' servers; what matters of them is told by metrics and `/readyz`.
    if !asked("hickory") {
        all += ",hickory_resolver=off,hickory_net=off,hickory_proto=off";
    }
    // What it complains of comes to us as an error too, which we tell once.
    if !asked("kube") {
        all += ",kube_client=off,kube_runtime=off";
    }
    let filter = tracing_subscriber::EnvFilter::try_new(all);
    match (directives.iter().all(|text| directive(text)), filter) {
        (true, Ok(filter)) => Ok(filter),
        _ => anyhow::bail!(
            "--log-level {level:?}: give error, warn, info, debug or trace, and directives such as meshlb::plan=debug"
        ),
    }
}

fn init_log(options: &Options, level: &str) -> anyhow::Result<()> {
    let filter = log_filter(level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Colours are for people: a file or a pipe gets plain text.
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // It would tell so on stderr, and panic there.
        .log_internal_errors(false);
    // Only the first call of a process counts.
    let _ = match options.log_format {
        options::LogFormat::Text => builder.try_init(),
        options::LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_log_level_is_a_level_or_a_directive() {
        for good in [
            "off",
            "error",
            "warn",
            "INFO",
            "debug",
            "trace",
            "meshlb=debug",
            "warn,meshlb::plan=trace",
            "off, kube=warn",
        ] {
            assert!(super::log_filter(good).is_ok(), "{good}");
        }
        for bad in ["warning", "foo", "", "warn,foo", "meshlb=loud", "meshlb::plan", "=debug", "3"] {
            let said = super::log_filter(bad).unwrap_err().to_string();
            assert!(
                said.starts_with("--log-level") && said.contains("error, warn, info, debug or trace"),
                "{bad}: {said}"
            );
            assert_eq!(said.lines().count(), 1, "{said}");
        }
    }
}
