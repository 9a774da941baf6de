//! `nudged dead`: deliveries that a running server gave up on.

use std::process::ExitCode;

use super::client::{ClientArgs, refusal};
use crate::api::proto::RedriveDeliveriesRequest;
use crate::api::proto::admin_service_client::AdminServiceClient;

#[derive(clap::Subcommand)]
pub enum DeadCommand {
    /// Send dead deliveries again: one, those that fit, or all that are kept
    Redrive(RedriveArgs),
}

#[derive(clap::Args)]
pub struct RedriveArgs {
    /// Exactly this delivery, by the id in its payload
    #[arg(long, value_name = "UUID", conflicts_with_all = ["notification", "user", "all"])]
    pub nudged_id: Option<String>,
    /// Only deliveries of this notification
    #[arg(long, value_name = "UUID")]
    pub notification: Option<String>,
    /// Only deliveries to this person
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Only those that died of this (TOKEN_GONE, REJECTED, RETRIES_OVER, POISON, MAYBE_SENT); may be repeated
    #[arg(long = "reason", value_name = "REASON")]
    pub reasons: Vec<String>,
    /// All that are kept, where nothing else narrows it
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Page by page, until the server has been through its history.
pub async fn run(command: DeadCommand) -> anyhow::Result<ExitCode> {
    let DeadCommand::Redrive(arguments) = command;
    let narrowed = arguments.nudged_id.is_some()
        || arguments.notification.is_some()
        || arguments.user.is_some()
        || !arguments.reasons.is_empty();
    anyhow::ensure!(narrowed || arguments.all, "say which: --nudged-id, --notification, --user, --reason or --all");
    let (channel, bearer) = arguments.client.connect().await?;
    let mut client = AdminServiceClient::with_interceptor(channel, bearer);
    let mut request = RedriveDeliveriesRequest {
        app_id: arguments.client.app.unwrap_or_default(),
        nudged_id: arguments.nudged_id.unwrap_or_default(),
        notification_id: arguments.notification.unwrap_or_default(),
        user_id: arguments.user.unwrap_or_default(),
        reasons: arguments.reasons,
        ..RedriveDeliveriesRequest::default()
    };
    let (mut redriven, mut too_late) = (0, 0);
    loop {
        let answer = client.redrive_deliveries(request.clone()).await.map_err(|status| refusal(&status))?.into_inner();
        redriven += answer.redriven;
        too_late += answer.too_late;
        if answer.next_page_token.is_empty() {
            break;
        }
        request.page_token = answer.next_page_token;
    }
    println!("{redriven} deliveries are open again; {too_late} are past their time and stay dead");
    Ok(ExitCode::SUCCESS)
}
