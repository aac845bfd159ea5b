//! The real server on loopback, patches to serve, and a client that speaks HTTP/1.1 and nothing more.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bitfit::base::Base;
use bitfit::base::problem::{Problem, Texts};
use bitfit::patch::{Dtype, Patch, Selection};
use serde_json::Value;

/// The bytes of a patch over `base` whose values, and so whose answers, follow from `seed`.
pub fn patch(base: &Base, spec: &str, problem: Problem, texts: Texts, seed: u64) -> Vec<u8> {
    let selection = Selection::parse(spec).unwrap();
    Patch::random(base, &selection, problem, texts, seed).unwrap().to_bytes(Dtype::F32).unwrap()
}

/// A patch of every bias for texts of two classes.
pub fn two_classes(base: &Base, seed: u64) -> Vec<u8> {
    let problem = Problem::Classes(vec!["bad".into(), "good".into()]);
    patch(base, "bitfit", problem, Texts::One, seed)
}

/// The content hash in a patch's bytes.
pub fn hash_of(patch: &[u8]) -> String {
    Patch::from_bytes(patch, Path::new("a patch")).unwrap().content_hash().to_string()
}

/// Waits until something has come about, at most 30 s.
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A running `bitfit serve`; killed when it is dropped.
pub struct Served {
    pub child: Child,
    pub address: String,
}

impl Served {
    /// Starts `command serve --patches STORE --listen 127.0.0.1:0` with further arguments, and waits until it is ready.
    pub fn start(mut command: Command, store: &str, more: &[&str]) -> Served {
        command.args(["serve", "--patches", store, "--listen", "127.0.0.1:0", "--threads", "1", "--log", "warn"]);
        let mut child = command.args(more).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.next().map(Result::unwrap).unwrap_or_default();
        let Some((_, address)) = first.split_once("http://") else {
            panic!("the server did not start: {first:?}, {:?}", child.wait());
        };
        // What else it prints is read, so that it never waits for a reader.
        let address = address.to_string();
        std::thread::spawn(move || lines.for_each(drop));
        Served { child, address }
    }

    /// A request on a connection of its own.
    pub fn ask(&self, method: &str, path: &str, body: impl AsRef<[u8]>) -> Reply {
        Client::new(&self.address).ask(method, path, &[], body.as_ref())
    }

    /// Asks a task for one text.
    pub fn predict(&self, task: &str, text: &str) -> Reply {
        let body = serde_json::json!({"inputs": [{"text": text}]}).to_string();
        self.ask("POST", &format!("/v1/tasks/{task}/predict"), body)
    }

    /// Sends a signal, as `kill` does.
    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Waits for the end, at most so long; the exit code.
    pub fn ended(&mut self, within: Duration) -> Option<i32> {
        let until = Instant::now() + within;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the server did not end within {within:?}");
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// Asserts the status, and the code of the error.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str) {
        let body = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{body}");
        assert_eq!(self.json()["error"]["code"], code, "{body}");
        assert!(!self.json()["error"]["message"].as_str().unwrap().is_empty());
    }

    /// This answer, which must be a success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!((200..300).contains(&self.status), "{}: {}", self.status, String::from_utf8_lossy(&self.body));
        self
    }
}

/// A connection that is kept.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub fn new(address: &str) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream: BufReader::new(stream) }
    }

    /// A request and its answer.
    pub fn ask(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.send(method, path, headers, body);
        self.reply().expect("an answer")
    }

    /// A request alone.
    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n", body.len());
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        head += "\r\n";
        self.raw(&[head.as_bytes(), body].concat());
    }

    /// Bytes as they are; a server that has hung up is met when its answer is read.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).ok();
    }

    /// The next answer; `None` where the server has hung up.
    pub fn reply(&mut self) -> Option<Reply> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let status = line.split(' ').nth(1)?.parse().ok()?;
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_string()));
        }
        let length = headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, n)| n.parse().unwrap());
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).ok()?;
        Some(Reply { status, headers, body })
    }
}
