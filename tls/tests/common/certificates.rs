//! Certificates for tests: a CA of their own, and what it signs.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

/// A CA with its certificate in a file.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pub ca: PathBuf,
    dir: PathBuf,
}

/// A certificate and its key, as files.
#[derive(Clone, Debug)]
pub struct Signed {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// A new CA, called `name`, with its files in `dir`.
    pub fn new(dir: &Path, name: &str) -> Authority {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("CA {name}"));
        let ca = dir.join(format!("{name}-ca.pem"));
        std::fs::write(&ca, params.self_signed(&key).expect("a certificate").pem()).expect("a file");
        Authority { issuer: Issuer::new(params, key), ca, dir: dir.to_owned() }
    }

    /// A certificate for the node called `file`, and for these names and addresses; files of the same `file` are replaced, each at once.
    pub fn sign(&self, file: &str, names: &[&str]) -> Signed {
        let key = KeyPair::generate().expect("a key");
        let names: Vec<String> = [file].iter().chain(names).map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.distinguished_name.push(rcgen::DnType::CommonName, file);
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let signed =
            Signed { certificate: self.dir.join(format!("{file}.pem")), key: self.dir.join(format!("{file}.key")) };
        replace(&signed.certificate, &certificate.pem());
        replace(&signed.key, &key.serialize_pem());
        signed
    }
}

/// Writes a file beside and renames it into place, as tools that renew certificates do. Others cannot read it.
pub fn replace(path: &Path, text: &str) {
    let partial = path.with_extension("partial");
    let opened = std::fs::File::options().write(true).create(true).truncate(true).mode(0o640).open(&partial);
    opened.expect("a file").write_all(text.as_bytes()).expect("it is written");
    std::fs::rename(&partial, path).expect("it is renamed");
}
