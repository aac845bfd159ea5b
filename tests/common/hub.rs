//! A small imitation of the hub on loopback: it answers requests for files of a repository as the hub does, and keeps
//! a record of them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// What was asked.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub token: Option<String>,
    pub if_none_match: Option<String>,
}

/// What is answered.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// The connection breaks after so many bytes of the body.
    pub cut: Option<usize>,
}

impl Answer {
    pub fn status(status: u16) -> Answer {
        Answer { status, headers: Vec::new(), body: b"an error page".to_vec(), cut: None }
    }
}

/// A server that lives as long as the test process.
#[derive(Clone)]
pub struct Server {
    pub url: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Server { url, log: Arc::default() };
        let (log, answer) = (server.log.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &log, &*answer));
            }
        });
        server
    }

    /// What was asked since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

/// One request a connection. A client that hangs up is no matter here.
fn serve(stream: TcpStream, log: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Answer) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace().map(str::to_string);
    let mut request = Request { method: words.next()?, path: words.next()?, token: None, if_none_match: None };
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(':') else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.token = Some(value.trim().to_string()),
            "if-none-match" => request.if_none_match = Some(value.trim().trim_matches('"').to_string()),
            _ => {}
        }
    }
    log.lock().unwrap().push(request.clone());
    let answer = answer(&request);
    let mut stream = stream;
    let mut head = format!("HTTP/1.1 {} imitation\r\nConnection: close\r\n", answer.status);
    head += &format!("Content-Length: {}\r\n", answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    if request.method == "GET" {
        stream.write_all(&answer.body[..answer.cut.unwrap_or(answer.body.len())]).ok()?;
    }
    Some(())
}

/// A repository at one commit.
#[derive(Clone)]
pub struct Repository {
    pub id: &'static str,
    pub commit: &'static str,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Repository {
    /// The hub's answer to a request for a file at one of these revisions, or at the commit.
    pub fn answer(&self, request: &Request, revisions: &[&str]) -> Answer {
        let Some((revision, name)) = self.asked(request) else {
            return Answer::status(404);
        };
        if revision != self.commit && !revisions.contains(&revision) {
            return Answer::status(404);
        }
        let commit = ("X-Repo-Commit", self.commit.to_string());
        let Some(body) = self.files.get(name) else {
            return Answer { headers: vec![commit], ..Answer::status(404) };
        };
        let etag = etag(name, body);
        let headers = vec![commit, ("ETag", format!("\"{etag}\""))];
        if request.if_none_match.as_deref() == Some(&etag) {
            return Answer { status: 304, headers, body: Vec::new(), cut: None };
        }
        Answer { status: 200, headers, body: body.clone(), cut: None }
    }

    /// Revision and file of a request to this repository. The id of a data set begins with `datasets/`.
    pub fn asked<'a>(&self, request: &'a Request) -> Option<(&'a str, &'a str)> {
        request.path.strip_prefix(&format!("/{}/resolve/", self.id))?.split_once('/')
    }
}

/// The hub names large files by their SHA-256 and others by a hash of 40 digits.
pub fn etag(name: &str, body: &[u8]) -> String {
    let hash: String = Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect();
    let is_large = [".safetensors", ".bin", ".parquet"].iter().any(|end| name.ends_with(end));
    if is_large { hash } else { hash[..40].to_string() }
}
