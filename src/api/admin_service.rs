//! The handlers of AdminService: read the message, resolve the app, call the service, write the answer.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::domain::violation::Violations;
use crate::service::{Call, Service, ServiceError};

use super::auth::Caller;
use super::proto::admin_service_server::AdminService;
use super::status::{ApiError, status};
use super::{access, convert, proto};

/// Implements the generated trait. Cheap to clone.
#[derive(Clone)]
pub struct AdminApi {
    service: Arc<Service>,
}

impl AdminApi {
    #[must_use]
    pub fn new(service: Arc<Service>) -> Self {
        Self { service }
    }

    /// Who calls, and the message. The auth layer leaves a caller in every request it lets through.
    fn open<T>(&self, request: Request<T>) -> Result<(Caller, T), Status> {
        let (_, mut extensions, message) = request.into_parts();
        let caller = extensions.remove::<Caller>();
        let caller = caller.ok_or_else(|| self.fail(ApiError::Internal("a request without a caller".to_owned())))?;
        Ok((caller, message))
    }

    fn call<'a>(&'a self, caller: &'a Caller, app_id: &str) -> Result<Call<'a>, Status> {
        access::call(&self.service.apps(), caller, app_id).map_err(|error| self.fail(error))
    }

    /// For what concerns every app: the key must be bound to all of them.
    fn everywhere(&self, caller: &Caller, app_id: &str) -> Result<Violations, Status> {
        access::all_apps(&self.service.apps(), caller).map_err(|error| self.fail(error))?;
        let mut violations = Violations::default();
        if !app_id.is_empty() {
            violations.add("app_id", "is given together with all_apps; give one of the two");
        }
        Ok(violations)
    }

    fn fail(&self, error: impl Into<ApiError>) -> Status {
        status(&error.into(), self.service.runtime())
    }

    fn answer<T>(&self, answer: Result<T, ServiceError>) -> Result<Response<T>, Status> {
        answer.map(Response::new).map_err(|error| self.fail(error))
    }
}

#[tonic::async_trait]
impl AdminService for AdminApi {
    async fn put_event_type(
        &self,
        request: Request<proto::PutEventTypeRequest>,
    ) -> Result<Response<proto::PutEventTypeResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let definition = message.event_type.map(|event_type| convert::definition(call.violations(), event_type));
        let put = self.service.put_event_type(call, definition).await;
        self.answer(put.map(|(version, changed)| proto::PutEventTypeResponse {
            event_type: Some(convert::event_type(&version)),
            changed: Some(changed),
        }))
    }

    async fn get_event_type(
        &self,
        request: Request<proto::GetEventTypeRequest>,
    ) -> Result<Response<proto::GetEventTypeResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let version = self.service.get_event_type(call, &message.name, message.version).await;
        self.answer(
            version.map(|version| proto::GetEventTypeResponse { event_type: Some(convert::event_type(&version)) }),
        )
    }

    async fn list_event_types(
        &self,
        request: Request<proto::ListEventTypesRequest>,
    ) -> Result<Response<proto::ListEventTypesResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let page = self.service.list_event_types(call, message.page_size, &message.page_token).await;
        self.answer(page.map(|(versions, next_page_token)| proto::ListEventTypesResponse {
            event_types: versions.iter().map(convert::event_type).collect(),
            next_page_token,
        }))
    }

    async fn delete_event_type(
        &self,
        request: Request<proto::DeleteEventTypeRequest>,
    ) -> Result<Response<proto::DeleteEventTypeResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let existed = self.service.delete_event_type(call, &message.name).await;
        self.answer(existed.map(|existed| proto::DeleteEventTypeResponse { existed: Some(existed) }))
    }

    async fn preview(
        &self,
        request: Request<proto::PreviewRequest>,
    ) -> Result<Response<proto::PreviewResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::preview(call.violations(), message);
        let previews = self.service.preview(call, input).await;
        self.answer(previews.map(|previews| proto::PreviewResponse {
            previews: previews.into_iter().map(convert::previewed).collect(),
        }))
    }

    async fn pause_delivery(
        &self,
        request: Request<proto::PauseDeliveryRequest>,
    ) -> Result<Response<proto::PauseDeliveryResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let (all_apps, app_id) = (message.all_apps, message.app_id.clone());
        let paused = if all_apps {
            let mut violations = self.everywhere(&caller, &app_id)?;
            let input = convert::pause_delivery(&mut violations, message);
            self.service.pause_everywhere(violations, input).await
        } else {
            let mut call = self.call(&caller, &app_id)?;
            let input = convert::pause_delivery(call.violations(), message);
            self.service.pause_delivery(call, input).await
        };
        self.answer(paused.map(|changed| proto::PauseDeliveryResponse { changed: Some(changed) }))
    }

    async fn resume_delivery(
        &self,
        request: Request<proto::ResumeDeliveryRequest>,
    ) -> Result<Response<proto::ResumeDeliveryResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let (all_apps, app_id) = (message.all_apps, message.app_id.clone());
        let resumed = if all_apps {
            let mut violations = self.everywhere(&caller, &app_id)?;
            let input = convert::resume_delivery(&mut violations, message);
            self.service.resume_everywhere(violations, input).await
        } else {
            let mut call = self.call(&caller, &app_id)?;
            let input = convert::resume_delivery(call.violations(), message);
            self.service.resume_delivery(call, input).await
        };
        self.answer(resumed.map(|changed| proto::ResumeDeliveryResponse { changed: Some(changed) }))
    }

    async fn list_pauses(
        &self,
        request: Request<proto::ListPausesRequest>,
    ) -> Result<Response<proto::ListPausesResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let pauses = if message.all_apps {
            let violations = self.everywhere(&caller, &message.app_id)?;
            violations.finish().map_err(|wrong| self.fail(ServiceError::Invalid(wrong)))?;
            self.service.list_all_pauses().await
        } else {
            self.service.list_pauses(self.call(&caller, &message.app_id)?).await
        };
        self.answer(
            pauses.map(|pauses| proto::ListPausesResponse { pauses: pauses.into_iter().map(convert::pause).collect() }),
        )
    }

    async fn get_provider_status(
        &self,
        request: Request<proto::GetProviderStatusRequest>,
    ) -> Result<Response<proto::GetProviderStatusResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let call = self.call(&caller, &message.app_id)?;
        let routes = self.service.provider_status(call).await;
        self.answer(routes.map(|routes| proto::GetProviderStatusResponse {
            routes: routes.into_iter().map(convert::provider_status).collect(),
        }))
    }

    async fn confirm_retirements(
        &self,
        request: Request<proto::ConfirmRetirementsRequest>,
    ) -> Result<Response<proto::ConfirmRetirementsResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::route_choice(call.violations(), message);
        let confirmed = self.service.confirm_retirements(call, input).await;
        self.answer(confirmed.map(|confirmed| proto::ConfirmRetirementsResponse { confirmed: Some(confirmed) }))
    }

    async fn redrive_deliveries(
        &self,
        request: Request<proto::RedriveDeliveriesRequest>,
    ) -> Result<Response<proto::RedriveDeliveriesResponse>, Status> {
        let (caller, message) = self.open(request)?;
        let mut call = self.call(&caller, &message.app_id)?;
        let input = convert::redrive(call.violations(), message);
        let answer = self.service.redrive(call, input).await;
        self.answer(answer.map(|answer| proto::RedriveDeliveriesResponse {
            redriven: answer.redriven,
            too_late: answer.too_late,
            next_page_token: answer.next_page_token,
        }))
    }

    async fn confirm_restore(
        &self,
        request: Request<proto::ConfirmRestoreRequest>,
    ) -> Result<Response<proto::ConfirmRestoreResponse>, Status> {
        let (caller, _) = self.open(request)?;
        self.everywhere(&caller, "")?;
        let since = self.service.confirm_restore().await;
        self.answer(since.map(|since| proto::ConfirmRestoreResponse {
            confirmed: Some(since.is_some()),
            held_since: since.map(convert::time),
        }))
    }
}
