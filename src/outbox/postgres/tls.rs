//! TLS towards the databases.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use super::{PostgresConnection, PostgresError};

/// The client's side of TLS. Whether a connection is encrypted is the URL's `sslmode`.
pub(super) fn client_config(options: &PostgresConnection) -> Result<ClientConfig, PostgresError> {
    let mut roots = RootCertStore::empty();
    match &options.ca_file {
        Some(path) => {
            for certificate in certificates("ca_file", path)? {
                let added = roots.add(certificate);
                added.map_err(|error| fault("ca_file", path, &error))?;
            }
        }
        // Without any, only connections with TLS fail, and say so.
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| PostgresError::Tls(error.to_string()))?
        .with_root_certificates(roots);
    let Some((certificate, key)) = &options.identity else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates("certificate_file", certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| fault("key_file", key, &e))?;
    let config = builder.with_client_auth_cert(chain, private);
    config.map_err(|error| fault("certificate_file", certificate, &error))
}

fn certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, PostgresError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<_, _>>);
    let read: Vec<_> = read.map_err(|error| fault(setting, path, &error))?;
    if read.is_empty() {
        return Err(fault(setting, path, &"holds no certificate"));
    }
    Ok(read)
}

fn fault(setting: &str, path: &Path, error: &dyn std::fmt::Display) -> PostgresError {
    PostgresError::Tls(format!("{setting} {}: {error}", path.display()))
}
