//! Keys and certificates of the fake providers: a CA, an APNs key and client certificate, a service account.
//!
//! In a directory the keys and the CA certificate outlive the process, so that a configuration made from it keeps
//! working. What holds an address (server certificate, service account's token_uri) or a topic (client certificate) is
//! made anew at each start, from the same keys.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{self, KeySize};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Options, SandboxError, tls};
use crate::runtime::Runtime;

/// The APNs key's id; ten characters like Apple's.
pub const KEY_ID: &str = "SANDBOX001";

/// The developer team that owns the key.
pub const TEAM_ID: &str = "SANDBOXTEA";

pub(super) const CA_FILE: &str = "ca.pem";
const CA_KEY_FILE: &str = "ca.key";
pub(super) const APNS_KEY_FILE: &str = "AuthKey_SANDBOX001.p8";
pub(super) const APNS_CERT_FILE: &str = "apns-client.pem";
pub(super) const APNS_CERT_KEY_FILE: &str = "apns-client.key";
pub(super) const SERVICE_ACCOUNT_FILE: &str = "service-account.json";

/// What a sender needs to be let in. No Debug: these are private keys.
#[derive(Clone)]
pub struct Credentials {
    /// The `.p8`: PKCS#8 PEM of an EC P-256 key.
    pub apns_key_pem: String,
    pub key_id: String,
    pub team_id: String,
    /// APNs client certificate with its topics, PEM.
    pub client_cert_pem: String,
    /// Its key, PKCS#8 PEM.
    pub client_key_pem: String,
    /// A Google service-account file; its `token_uri` is the sandbox's token endpoint.
    pub service_account_json: String,
    pub client_email: String,
    /// PKCS#8 PEM of an RSA-2048 key.
    pub service_account_key_pem: String,
    pub private_key_id: String,
}

/// Everything the servers themselves need.
pub(super) struct Identity {
    pub credentials: Credentials,
    pub ca_pem: String,
    pub ca: CertificateDer<'static>,
    pub server_chain: Vec<CertificateDer<'static>>,
    pub server_key: PrivateKeyDer<'static>,
    /// Uncompressed point of the APNs key.
    pub apns_public_key: Vec<u8>,
    /// DER RSAPublicKey of the service account.
    pub service_account_public_key: Vec<u8>,
}

/// Loads what `dir` holds, makes the rest.
pub(super) fn prepare(runtime: &Runtime, options: &Options, token_uri: &str) -> Result<Identity, SandboxError> {
    let dir = options.dir.as_deref();
    if let Some(dir) = dir {
        fs::create_dir_all(dir).map_err(|source| SandboxError::File { path: dir.to_owned(), source })?;
    }
    let (ca_key, new_ca) = rcgen_key(dir, CA_KEY_FILE)?;
    let ca_params = ca_params();
    let ca_pem = match dir.map(|dir| read(&dir.join(CA_FILE))).transpose()?.flatten() {
        Some(pem) if !new_ca => pem,
        _ => ca_params.self_signed(&ca_key).map_err(SandboxError::Certificate)?.pem(),
    };
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes())
        .map_err(|_| SandboxError::Key { what: CA_FILE, path: dir.map(|dir| dir.join(CA_FILE)) })?;
    let issuer = Issuer::new(ca_params, ca_key);

    let server_key = KeyPair::generate().map_err(SandboxError::Certificate)?;
    let server = server_params(options)?.signed_by(&server_key, &issuer).map_err(SandboxError::Certificate)?;
    let (client_key, _) = rcgen_key(dir, APNS_CERT_KEY_FILE)?;
    let client = client_params(options).signed_by(&client_key, &issuer).map_err(SandboxError::Certificate)?;

    let (apns_key_pem, apns_public_key) = apns_key(dir)?;
    let account = ServiceAccount::prepare(runtime, dir)?;
    let credentials = Credentials {
        apns_key_pem,
        key_id: KEY_ID.to_owned(),
        team_id: TEAM_ID.to_owned(),
        client_cert_pem: client.pem(),
        client_key_pem: client_key.serialize_pem(),
        service_account_json: account.json(&options.project_id, token_uri),
        client_email: client_email(&options.project_id),
        service_account_key_pem: account.key_pem,
        private_key_id: account.key_id,
    };
    if let Some(dir) = dir {
        let secret = |name: &str, text: &str| write(&dir.join(name), text, 0o600);
        write(&dir.join(CA_FILE), &ca_pem, 0o644)?;
        write(&dir.join(APNS_CERT_FILE), &credentials.client_cert_pem, 0o644)?;
        secret(CA_KEY_FILE, &issuer.key().serialize_pem())?;
        secret(APNS_CERT_KEY_FILE, &credentials.client_key_pem)?;
        secret(APNS_KEY_FILE, &credentials.apns_key_pem)?;
        secret(SERVICE_ACCOUNT_FILE, &credentials.service_account_json)?;
    }
    Ok(Identity {
        credentials,
        ca_pem,
        server_chain: vec![server.der().clone(), ca.clone()],
        ca,
        server_key: PrivatePkcs8KeyDer::from(server_key.serialize_der()).into(),
        apns_public_key,
        service_account_public_key: account.public_key,
    })
}

/// The service account of a project.
pub(super) fn client_email(project_id: &str) -> String {
    format!("nudged-sandbox@{project_id}.iam.gserviceaccount.com")
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name("nudged sandbox CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = rcgen::date_time_ymd(2024, 1, 1);
    params.not_after = rcgen::date_time_ymd(2049, 12, 31);
    params
}

fn leaf_params(mut params: CertificateParams, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.not_before = rcgen::date_time_ymd(2024, 1, 1);
    params.not_after = rcgen::date_time_ymd(2049, 12, 31);
    params
}

fn server_params(options: &Options) -> Result<CertificateParams, SandboxError> {
    let mut names = vec!["127.0.0.1".to_owned(), "::1".to_owned(), "localhost".to_owned()];
    if let Some(host) = &options.public_host {
        names.push(host.clone());
    }
    let mut params = CertificateParams::new(names).map_err(SandboxError::Certificate)?;
    params.distinguished_name = name("nudged sandbox");
    Ok(leaf_params(params, ExtendedKeyUsagePurpose::ServerAuth))
}

fn client_params(options: &Options) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&format!("Apple Push Services: {}", options.bundle_id));
    // The subject's UID, where Apple puts the certificate's main topic.
    params
        .distinguished_name
        .push(DnType::CustomDnType(vec![0, 9, 2342, 19_200_300, 100, 1, 1]), options.bundle_id.as_str());
    let topics = tls::topics_extension(&options.certificate_topics());
    params.custom_extensions = vec![CustomExtension::from_oid_content(tls::TOPICS_OID, topics)];
    leaf_params(params, ExtendedKeyUsagePurpose::ClientAuth)
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// The key in this file, or a new one; true when it is new.
fn rcgen_key(dir: Option<&Path>, file: &'static str) -> Result<(KeyPair, bool), SandboxError> {
    let path = dir.map(|dir| dir.join(file));
    if let Some(path) = &path
        && let Some(pem) = read(path)?
    {
        let key =
            KeyPair::from_pem(&pem).map_err(|_| SandboxError::Key { what: "private key", path: Some(path.clone()) })?;
        return Ok((key, false));
    }
    Ok((KeyPair::generate().map_err(SandboxError::Certificate)?, true))
}

/// The `.p8` and its public point.
fn apns_key(dir: Option<&Path>) -> Result<(String, Vec<u8>), SandboxError> {
    let path = dir.map(|dir| dir.join(APNS_KEY_FILE));
    let bad = || SandboxError::Key { what: "ES256 key", path: path.clone() };
    let kept = path.as_deref().map(read).transpose()?.flatten();
    let pem = if let Some(pem) = kept {
        pem
    } else {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map_err(|_| SandboxError::Random)?;
        pkcs8_pem(key.to_pkcs8v1().map_err(|_| SandboxError::Random)?.as_ref())
    };
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| bad())?;
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der()).map_err(|_| bad())?;
    let public = key.public_key().as_ref().to_vec();
    Ok((pem, public))
}

struct ServiceAccount {
    key_pem: String,
    key_id: String,
    public_key: Vec<u8>,
}

impl ServiceAccount {
    fn prepare(runtime: &Runtime, dir: Option<&Path>) -> Result<Self, SandboxError> {
        let path = dir.map(|dir| dir.join(SERVICE_ACCOUNT_FILE));
        let bad = || SandboxError::Key { what: "service account", path: path.clone() };
        if let Some(text) = path.as_deref().map(read).transpose()?.flatten() {
            let file: serde_json::Value = serde_json::from_str(&text).map_err(|_| bad())?;
            let key_pem = file["private_key"].as_str().ok_or_else(bad)?.to_owned();
            let key_id = file["private_key_id"].as_str().ok_or_else(bad)?.to_owned();
            let der = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| bad())?;
            let key = rsa::KeyPair::from_pkcs8(der.secret_pkcs8_der()).map_err(|_| bad())?;
            let public_key = key.public_key().as_ref().to_vec();
            return Ok(Self { key_pem, key_id, public_key });
        }
        let key = rsa::KeyPair::generate(KeySize::Rsa2048).map_err(|_| SandboxError::Random)?;
        let der: Pkcs8V1Der<'_> = key.as_der().map_err(|_| SandboxError::Random)?;
        Ok(Self {
            key_pem: pkcs8_pem(der.as_ref()),
            key_id: runtime.uuid().simple().to_string(),
            public_key: key.public_key().as_ref().to_vec(),
        })
    }

    fn json(&self, project_id: &str, token_uri: &str) -> String {
        let file = serde_json::json!({
            "type": "service_account",
            "project_id": project_id,
            "private_key_id": self.key_id,
            "private_key": self.key_pem,
            "client_email": client_email(project_id),
            "client_id": "100000000000000000001",
            "auth_uri": token_uri,
            "token_uri": token_uri,
            "universe_domain": "googleapis.com",
        });
        format!("{file:#}\n")
    }
}

fn pkcs8_pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
    for start in (0..text.len()).step_by(64) {
        pem.push_str(&text[start..text.len().min(start + 64)]);
        pem.push('\n');
    }
    pem.push_str("-----END PRIVATE KEY-----\n");
    pem
}

/// The file's text, or nothing when there is no such file.
fn read(path: &Path) -> Result<Option<String>, SandboxError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SandboxError::File { path: path.to_owned(), source }),
    }
}

/// Replaces the file as a whole: a reader sees the old text or the new one, and never a secret with loose permissions.
pub(super) fn write(path: &Path, text: &str, mode: u32) -> Result<(), SandboxError> {
    let attempt = || -> io::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary: PathBuf = path.with_file_name(name);
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
        #[cfg(not(unix))]
        let _ = mode;
        let mut file = options.open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    attempt().map_err(|source| SandboxError::File { path: path.to_owned(), source })
}
