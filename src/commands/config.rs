//! `nudged config`: what holds and where it was said, and every key there is.

use std::path::Path;
use std::process::ExitCode;

use crate::config::{Config, ConfigErrors, reference};

#[derive(clap::Subcommand)]
pub enum ConfigCommand {
    /// Print the configuration in force, secrets left out, with the origin of each value
    Print,
    /// Print a file with every key and its default, commented out
    Reference,
}

pub fn run(command: &ConfigCommand, explicit: Option<&Path>) -> anyhow::Result<ExitCode> {
    match command {
        ConfigCommand::Reference => print!("{}", reference::toml()),
        ConfigCommand::Print => {
            let (config, problems) = Config::read(explicit);
            print!("{}", config.settings.print());
            // What could not be understood is not in force: say so after what is.
            if !problems.is_empty() {
                return Err(ConfigErrors { problems }.into());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
