//! A TCP proxy in front of the server that can cut, stop and swallow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

#[derive(Default)]
struct State {
    /// New connections are refused.
    down: AtomicBool,
    /// What a message must hold for its answer to be lost, and how many still are: the server does it, the client's
    /// connection ends.
    lose: std::sync::Mutex<&'static [u8]>,
    losses: AtomicUsize,
}

pub struct Proxy {
    pub port: u16,
    state: Arc<State>,
    cut: std::sync::Mutex<CancellationToken>,
}

impl Proxy {
    /// In front of `server` (host and port).
    pub async fn new(server: String) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let proxy =
            Arc::new(Self { port, state: Arc::default(), cut: std::sync::Mutex::new(CancellationToken::new()) });
        let weak = Arc::downgrade(&proxy);
        crate::runtime::Runtime::production().spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Some(proxy) = weak.upgrade() else { break };
                if proxy.state.down.load(Ordering::SeqCst) {
                    continue;
                }
                let cut = proxy.cut.lock().unwrap().clone();
                let (state, server) = (Arc::clone(&proxy.state), server.clone());
                crate::runtime::Runtime::production().spawn(async move {
                    tokio::select! {
                        () = cut.cancelled() => {}
                        () = carry(client, &server, &state) => {}
                    }
                });
            }
        });
        proxy
    }

    /// Cuts every connection and refuses new ones until [`Proxy::mend`].
    pub fn cut(&self) {
        self.state.down.store(true, Ordering::SeqCst);
        let mut cut = self.cut.lock().unwrap();
        cut.cancel();
        *cut = CancellationToken::new();
    }

    /// Refuses new connections until [`Proxy::mend`], and leaves those that stand.
    pub fn refuse(&self) {
        self.state.down.store(true, Ordering::SeqCst);
    }

    pub fn mend(&self) {
        self.state.down.store(false, Ordering::SeqCst);
    }

    /// The answer to the next message that holds this is lost.
    pub fn lose_answer_to(&self, part: &'static [u8]) {
        *self.state.lose.lock().unwrap() = part;
        self.state.losses.store(1, Ordering::SeqCst);
    }

    pub fn is_lost(&self) -> bool {
        self.state.losses.load(Ordering::SeqCst) == 0
    }
}

#[expect(clippy::disallowed_methods, reason = "the proxy is the network of this test")]
async fn carry(mut client: TcpStream, server: &str, state: &State) {
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    let (mut up, mut down) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut losing = false;
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(count @ 1..) = read else { return };
                let part = *state.lose.lock().unwrap();
                let holds = !part.is_empty() && up[..count].windows(part.len()).any(|window| window == part);
                let taken = |left: usize| left.checked_sub(1);
                if holds && state.losses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, taken).is_ok() {
                    losing = true;
                }
                if server.write_all(&up[..count]).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut down) => {
                let Ok(count @ 1..) = read else { return };
                // The server has answered: what it did is done.
                if losing || client.write_all(&down[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}
