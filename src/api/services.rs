//! Which service a request is for.
//!
//! tonic's own router is axum's: a request goes through its matcher, and bodies are wrapped in its type and back, a dozen
//! allocations for each call. What backends call all day is told by its path and called directly; the rest goes that way.

use std::convert::Infallible;
use std::task::{Context, Poll};

use futures_util::future::{BoxFuture, Either};
use http::{Request, Response};
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::Routes;
use tower::Service;

type Answer = Result<Response<Body>, Infallible>;

/// One service by its name, all others by the router.
#[derive(Clone)]
pub struct Services<S> {
    first: S,
    others: Routes,
}

impl<S> Services<S> {
    pub fn new(first: S, others: Routes) -> Self {
        Self { first, others: others.prepare() }
    }
}

impl<S> Service<Request<Body>> for Services<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
{
    type Response = Response<Body>;
    type Error = Infallible;
    // The router's future is many times as large as the other, and whoever holds this one moves it from layer to layer.
    type Future = Either<S::Future, BoxFuture<'static, Answer>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        match self.first.poll_ready(cx) {
            Poll::Ready(Ok(())) => Service::<Request<Body>>::poll_ready(&mut self.others, cx),
            other => other,
        }
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        let method = path.strip_prefix('/').and_then(|path| path.strip_prefix(S::NAME));
        if method.is_some_and(|method| method.starts_with('/')) {
            Either::Left(self.first.call(request))
        } else {
            Either::Right(Box::pin(self.others.call(request)))
        }
    }
}
