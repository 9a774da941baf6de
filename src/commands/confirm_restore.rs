//! `nudged confirm-restore`: lets deliveries go out again after a restore from a backup.

use std::process::ExitCode;

use super::client::{ClientArgs, refusal};
use crate::api::proto::ConfirmRestoreRequest;
use crate::api::proto::admin_service_client::AdminServiceClient;

#[derive(clap::Args)]
pub struct ConfirmRestoreArgs {
    #[command(flatten)]
    pub client: ClientArgs,
}

pub async fn run(arguments: ConfirmRestoreArgs) -> anyhow::Result<ExitCode> {
    let (channel, bearer) = arguments.client.connect().await?;
    let mut client = AdminServiceClient::with_interceptor(channel, bearer);
    let answer =
        client.confirm_restore(ConfirmRestoreRequest {}).await.map_err(|status| refusal(&status))?.into_inner();
    match answer.held_since {
        Some(since) if answer.confirmed() => println!("confirmed: deliveries, held since {since}, go out again"),
        _ => println!("nothing was held: nothing to confirm"),
    }
    Ok(ExitCode::SUCCESS)
}
