//! Under load, while patches are uploaded, replaced by hand, removed, rolled back, dropped and loaded again, every
//! answer is to the bit the one that its patch version gives alone; and what is malformed harms nobody.
//!
//! `BITFIT_SOAK_S` says for how long (default 20 s), `BITFIT_FUZZ` how many malformed requests (default 20,000).

#[path = "common/command.rs"]
mod command;
#[path = "common/served.rs"]
mod served;

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bitfit::base::Base;
use bitfit::device::Placement;
use bitfit::encoder::Encoder;
use bitfit::patch::Patch;
use bitfit::predict::{Input, TaskPatch, json, predict};
use command::{bitfit, tiny};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use served::{Client, Served, hash_of, two_classes};

const TASKS: [&str; 6] = ["t0", "t1", "t2", "t3", "t4", "t5"];
const VERSIONS: usize = 4;
const TEXTS: [&str; 5] = [
    "the movie was good",
    "a bad plot",
    "they play it was the film . it was the film . it was the film .",
    "dog",
    "the cat was not great and the film was very good",
];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |n| n.parse().expect("a number"))
}

/// Each version of each task: its file, its hash, and its answers alone.
struct Version {
    bytes: Vec<u8>,
    hash: String,
    answers: Vec<Value>,
}

fn versions(base: &Base) -> Vec<Vec<Version>> {
    let encoder = Encoder::new(base, Placement { n_threads: 1, ..Placement::default() }).unwrap();
    let version = |seed: usize| {
        let bytes = two_classes(base, seed as u64);
        let task = TaskPatch::attach(Patch::from_bytes(&bytes, "a version".as_ref()).unwrap(), &encoder).unwrap();
        let answer = |text: &&str| {
            let input = Input { text: text.to_string(), text_pair: None };
            let alone = predict(&encoder, std::slice::from_ref(&task), &[input]).unwrap();
            json::task(&task, &alone.of_tasks[0])["predictions"][0].clone()
        };
        Version { hash: hash_of(&bytes), answers: TEXTS.iter().map(answer).collect(), bytes }
    };
    (0..TASKS.len()).map(|t| (0..VERSIONS).map(|v| version(1 + t * VERSIONS + v)).collect()).collect()
}

#[test]
fn an_answer_is_the_one_that_its_patch_version_gives_alone_whatever_changes_meanwhile() {
    let base = Base::from_folder(&tiny()).unwrap();
    let versions = versions(&base);
    let truth: Vec<BTreeMap<&str, &Vec<Value>>> =
        versions.iter().map(|of| of.iter().map(|v| (v.hash.as_str(), &v.answers)).collect()).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = |task: usize| folder.path().join(format!("{}.safetensors", TASKS[task]));
    (0..TASKS.len()).for_each(|task| fs::write(path(task), &versions[task][0].bytes).unwrap());
    // Room for half of the tasks, so that they drop each other; the store is looked at all the time.
    let one = Served::start(bitfit(), folder.path().to_str().unwrap(), &["--preload"]);
    let size = one.ask("GET", "/v1/tasks/t0", "").json()["size_bytes"].as_u64().unwrap();
    drop(one);
    let memory = (size * 3 + size / 2).to_string();
    let args = ["--patch-memory", &memory, "--poll", "0.05", "--batch-tokens", "200", "--queue", "100000"];
    let server = Served::start(bitfit(), folder.path().to_str().unwrap(), &args);
    let end = Instant::now() + Duration::from_secs(setting("BITFIT_SOAK_S", 20));
    let (answered, changed, missing) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));

    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (server, truth, answered, missing) = (&server, &truth, &answered, &missing);
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(seed);
                let mut client = Client::new(&server.address);
                while Instant::now() < end {
                    let mut tasks: Vec<usize> = (0..TASKS.len()).filter(|_| random.random_bool(0.4)).collect();
                    if tasks.is_empty() {
                        tasks.push(random.random_range(0..TASKS.len()));
                    }
                    let texts: Vec<usize> =
                        (0..random.random_range(1..6)).map(|_| random.random_range(0..TEXTS.len())).collect();
                    let body = json!({
                        "tasks": tasks.iter().map(|t| TASKS[*t]).collect::<Vec<_>>(),
                        "inputs": texts.iter().map(|t| json!({"text": TEXTS[*t]})).collect::<Vec<_>>(),
                    });
                    let reply = client.ask("POST", "/v1/predict", &[], body.to_string().as_bytes());
                    if reply.status == 404 {
                        missing.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let found = reply.ok().json();
                    for (task, result) in tasks.iter().zip(found["results"].as_array().unwrap()) {
                        assert_eq!(result["task"], TASKS[*task]);
                        let hash = result["patch"].as_str().unwrap();
                        let truth = truth[*task].get(hash).unwrap_or_else(|| panic!("{hash} is no version of {task}"));
                        for (text, p) in texts.iter().zip(result["predictions"].as_array().unwrap()) {
                            assert_eq!(p, &truth[*text], "task {task}, version {hash}, text {text}");
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        for (task, of_task) in versions.iter().enumerate() {
            let (server, changed, path) = (&server, &changed, path(task));
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(100 + task as u64);
                let mut client = Client::new(&server.address);
                let at = format!("/v1/tasks/{}", TASKS[task]);
                while Instant::now() < end {
                    let version = &of_task[random.random_range(0..VERSIONS)];
                    let now = match random.random_range(0..6) {
                        0 | 1 => {
                            client.ask("PUT", &at, &[], &version.bytes).ok();
                            Some(&version.hash)
                        }
                        2 => {
                            let body = json!({"patch": version.hash}).to_string();
                            let reply = client.ask("POST", &format!("{at}/rollback"), &[], body.as_bytes());
                            // A version that was never put here is none to go back to.
                            (reply.status != 404).then(|| reply.ok()).map(|_| &version.hash)
                        }
                        3 => {
                            let reply = client.ask("DELETE", &at, &[], b"");
                            assert!([204, 404].contains(&reply.status), "{}", reply.status);
                            None
                        }
                        4 => {
                            // By hand: written aside and renamed, as one should.
                            let aside = path.with_extension("tmp");
                            fs::write(&aside, &version.bytes).unwrap();
                            fs::rename(&aside, &path).unwrap();
                            client.ask("PUT", &at, &[], b"").ok();
                            Some(&version.hash)
                        }
                        _ => {
                            assert_eq!(client.ask("PUT", &at, &[], b"no patch").status, 422);
                            None
                        }
                    };
                    changed.fetch_add(1, Ordering::Relaxed);
                    // Nobody else changes this task: from the answer on, its version is the new one.
                    if let Some(hash) = now {
                        let body = json!({"inputs": [{"text": TEXTS[0]}]}).to_string();
                        let found = client.ask("POST", &format!("{at}/predict"), &[], body.as_bytes()).ok().json();
                        assert_eq!((&found["patch"], &found["predictions"][0]), (&json!(hash), &version.answers[0]));
                    }
                    std::thread::sleep(Duration::from_millis(random.random_range(0..40)));
                }
            });
        }
    });
    let [answered, changed, missing] = [answered, changed, missing].map(AtomicU64::into_inner);
    println!("{answered} answers, {changed} changes, {missing} requests of a task that was away");
    assert!(answered > 100 && changed > 50, "{answered} answers, {changed} changes");
}

/// Something that is no request, or none that can be answered.
fn malformed(random: &mut StdRng) -> (&'static str, String, Vec<u8>) {
    let valid = json!({"inputs": [{"text": "the movie was good"}, {"text": "bad"}]}).to_string();
    let values = [
        "1e999",
        "-1",
        "null",
        "true",
        "[]",
        "{}",
        "\"\\ud800\"",
        "18446744073709551616",
        "[[[[\"a\"]]]]",
        "\"\"",
        "{\"text\":1}",
        "{\"text\":null}",
        "{\"text\":\"a\",\"x\":1}",
        "[1e308,2]",
    ];
    let value = values[random.random_range(0..values.len())];
    let body: Vec<u8> = match random.random_range(0..8) {
        0 => valid.as_bytes()[..random.random_range(1..valid.len())].to_vec(),
        1 => {
            // A byte that no UTF-8 has.
            let mut bytes = valid.into_bytes();
            let at = random.random_range(0..bytes.len());
            bytes[at] = 0xff;
            bytes
        }
        2 => (0..random.random_range(1..200)).map(|_| random.random::<u8>() | 0x80).collect(),
        3 => format!("{{\"inputs\":{value}}}").into_bytes(),
        4 => format!("{{\"inputs\":[{value}],\"inputs\":3}}").into_bytes(),
        5 => ["[", "{\"inputs\":"][random.random_range(0..2)].repeat(random.random_range(100..2000)).into_bytes(),
        6 => format!("{{\"tasks\":{value},\"inputs\":{value}}}").into_bytes(),
        _ => vec![b' '; random.random_range(4001..9000)],
    };
    let (method, path) = match random.random_range(0..9) {
        0 => ("POST", "/v1/predict".to_string()),
        1 => ("PUT", "/v1/tasks/t0".into()),
        2 => ("POST", "/v1/tasks/t0/rollback".into()),
        3 => ("POST", "/predict".into()),
        4 => ("POST", "/v2/models/t0/infer".into()),
        5 => (
            "POST",
            format!("/v1/tasks/{}/predict", ["..", "%2e%2e%2f", "%00", "a%2fb", "%ff"][random.random_range(0..5)]),
        ),
        6 => ("PUT", format!("/v1/tasks/n{}", random.random::<u32>())),
        _ => ("POST", "/v1/tasks/t0/predict".into()),
    };
    (method, path, body)
}

#[test]
fn malformed_requests_give_4xx_alone_and_no_growth_of_memory() {
    let base = Base::from_folder(&tiny()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("t0.safetensors"), two_classes(&base, 1)).unwrap();
    let server = Served::start(bitfit(), folder.path().to_str().unwrap(), &["--max-body", "4KB"]);
    let expected = server.predict("t0", TEXTS[0]).ok().json();
    let rounds = setting("BITFIT_FUZZ", 20_000) / 2;
    let mut resident = Vec::new();
    for round in 0..2 {
        let mut random = StdRng::seed_from_u64(round);
        let mut client = Client::new(&server.address);
        for i in 0..rounds {
            let (method, path, body) = malformed(&mut random);
            if i % 50 == 0 {
                // Not even HTTP.
                let mut raw = Client::new(&server.address);
                raw.raw(&body);
                raw.raw(b"\r\n\r\n");
                if let Some(reply) = raw.reply() {
                    assert!((400..500).contains(&reply.status), "{}", reply.status);
                }
            }
            client.send(method, &path, &[], &body);
            // A body above the limit may be answered and hung up on before it is read.
            let Some(reply) = client.reply() else {
                client = Client::new(&server.address);
                continue;
            };
            let shown = String::from_utf8_lossy(&body);
            assert!((400..500).contains(&reply.status), "{method} {path} {shown}: {}", reply.status);
            if reply.header("connection") == Some("close") {
                client = Client::new(&server.address);
            }
        }
        resident.push(server.resident());
    }
    println!("resident after each half: {resident:?}");
    assert!(resident[1] < resident[0] + (8 << 20), "memory grew: {resident:?}");
    assert_eq!(server.predict("t0", TEXTS[0]).ok().json(), expected);
}
