use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use sha2::{Digest as _, Sha256};
use tonic::Code;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use super::harness::*;
use crate::api::auth::ApiKey;
use crate::api::proto::ListOptInsRequest;
use crate::api::proto::push_service_client::PushServiceClient;
use crate::api::server::{Server, ServerError};
use crate::api::tls::TlsSetup;

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn ca() -> Ca {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = params.self_signed(&key).expect("a certificate").pem();
    Ca { pem, issuer: Issuer::new(params, key) }
}

/// Certificate and key in PEM, and the certificate's fingerprint.
fn issue(ca: &Ca, name: &str) -> (String, String, [u8; 32]) {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
    let certificate = params.signed_by(&key, &ca.issuer).expect("a certificate");
    (certificate.pem(), key.serialize_pem(), Sha256::digest(certificate.der()).into())
}

#[tokio::test]
async fn a_client_certificate_stands_for_its_key() {
    let ca = ca();
    let (cert_pem, key_pem, _) = issue(&ca, "localhost");
    let (client_cert, client_key, fingerprint) = issue(&ca, "backend");
    let (other_cert, other_key, _) = issue(&ca, "stranger");
    let by_cert = ApiKey { sha256: None, client_cert_sha256: Some(fingerprint), ..root_key("backend") };
    let tls = TlsSetup {
        cert_pem: cert_pem.into_bytes(),
        key_pem: key_pem.into_bytes(),
        client_ca_pem: Some(ca.pem.clone().into_bytes()),
    };
    let keys = vec![by_cert, root_key("bearer")];
    let server = TestServer::with(Setup { keys, tls: Some(tls), ..Setup::default() }).await;
    let list = ListOptInsRequest { app_id: "pets".into(), user_id: "choco".into() };
    let connect = async |identity: Option<(String, String)>| {
        let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca.pem)).domain_name("localhost");
        if let Some((cert, key)) = identity {
            config = config.identity(Identity::from_pem(cert, key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", server.address)).expect("an address");
        endpoint.tls_config(config).expect("TLS").connect().await.expect("connected")
    };
    let channel = connect(Some((client_cert, client_key))).await;
    PushServiceClient::new(channel).list_opt_ins(list.clone()).await.expect("its certificate is its key");
    let channel = connect(Some((other_cert, other_key))).await;
    let refused = PushServiceClient::new(channel).list_opt_ins(list.clone()).await.expect_err("no key's");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, "CREDENTIAL_INVALID"));
    let channel = connect(None).await;
    let refused = PushServiceClient::new(channel.clone()).list_opt_ins(list.clone()).await.expect_err("nothing shown");
    assert_eq!(reason(&refused), "CREDENTIAL_MISSING");
    let mut request = tonic::Request::new(list);
    request.metadata_mut().insert("authorization", "Bearer nk_bearer".parse().expect("ASCII"));
    PushServiceClient::new(channel).list_opt_ins(request).await.expect("a bearer key works over TLS too");

    let plain = Endpoint::from_shared(format!("http://{}", server.address)).expect("an address").connect().await;
    assert!(
        plain.is_err() || {
            let mut client = PushServiceClient::new(plain.expect("checked"));
            client.list_opt_ins(ListOptInsRequest::default()).await.is_err()
        }
    );
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_refused_at_once() {
    let ca = ca();
    let (cert_pem, _, _) = issue(&ca, "localhost");
    let tls = TlsSetup { cert_pem: cert_pem.into_bytes(), key_pem: b"no key".to_vec(), client_ca_pem: None };
    let plain = TestServer::start().await;
    let (service, keys, limits, runtime) = plain.parts();
    assert!(matches!(Server::new(service, keys, limits, runtime).with_tls(&tls), Err(ServerError::Tls(_))));
}

#[tokio::test]
async fn a_replaced_certificate_is_presented_to_new_connections() {
    let (old, new) = (ca(), ca());
    let setup = |ca: &Ca| {
        let (cert_pem, key_pem, _) = issue(ca, "localhost");
        TlsSetup { cert_pem: cert_pem.into_bytes(), key_pem: key_pem.into_bytes(), client_ca_pem: None }
    };
    let server = TestServer::with(Setup { tls: Some(setup(&old)), ..Setup::default() }).await;
    let connect = async |ca: &Ca| {
        let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca.pem)).domain_name("localhost");
        let endpoint = Endpoint::from_shared(format!("https://{}", server.address)).expect("an address");
        endpoint.tls_config(config).expect("TLS").connect().await
    };
    let list = ListOptInsRequest { app_id: "pets".into(), user_id: "choco".into() };
    let mut open = PushServiceClient::new(connect(&old).await.expect("the old one"));
    open.list_opt_ins(list.clone()).await.expect("served");
    let broken = TlsSetup { cert_pem: b"none".to_vec(), ..setup(&new) };
    assert!(server.server.replace_tls(&broken).is_err());
    connect(&old).await.expect("what cannot be used replaces nothing");
    server.server.replace_tls(&setup(&new)).expect("usable");
    assert!(connect(&old).await.is_err());
    PushServiceClient::new(connect(&new).await.expect("the new one")).list_opt_ins(list.clone()).await.expect("served");
    open.list_opt_ins(list).await.expect("an open connection goes on");
}
