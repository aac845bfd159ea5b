//! The server before clients and stores that others wrote: Triton's client, an S3 server, a fuzzer of APIs, a browser.
//!
//! `scripts/oracles.sh DIR` installs them and prints what `$BITFIT_ORACLES` (a Python) and `$BITFIT_BROWSER` are to name;
//! `scripts/test.sh` does both. Without them these tests say that they were skipped. `$BITFIT_SCREENSHOTS` names a folder
//! for pictures of the page.

#[path = "common/command.rs"]
mod command;
#[path = "common/served.rs"]
mod served;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use bitfit::base::Base;
use bitfit::base::problem::{Problem, Texts};
use command::{bitfit, tiny};
use serde_json::{Value, json};
use served::{Served, hash_of, patch, two_classes};

const TEXT: &str = "the movie was good";

/// The Python that has the oracles.
fn python() -> Option<Command> {
    let python = std::env::var_os("BITFIT_ORACLES").filter(|path| !path.is_empty());
    if python.is_none() {
        println!("skipped: BITFIT_ORACLES names no Python; scripts/oracles.sh installs one");
    }
    Some(Command::new(python?))
}

fn script(name: &str) -> String {
    format!("{}/tests/oracles/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs a script to its end with what it reads, and gives what it printed.
fn run(mut command: Command, input: &str) -> String {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    out
}

fn base() -> Base {
    Base::from_folder(&tiny()).unwrap()
}

/// A store with tasks `a` and `b` of two classes, `pair` of three and two texts, `pair-value`, a value of two texts, and
/// `broken`, which is no patch.
fn store(base: &Base) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let three = Problem::Classes(["entailment", "neutral", "contradiction"].map(String::from).to_vec());
    for (name, bytes) in [
        ("a", two_classes(base, 1)),
        ("b", two_classes(base, 2)),
        ("pair", patch(base, "bitfit", three, Texts::Two, 3)),
        ("pair-value", patch(base, "bitfit", Problem::Value, Texts::Two, 4)),
        ("broken", b"no patch".to_vec()),
    ] {
        fs::write(folder.path().join(format!("{name}.safetensors")), bytes).unwrap();
    }
    folder
}

#[test]
fn tritons_client_gets_the_answers_of_the_own_api() {
    let Some(mut python) = python() else { return };
    let folder = store(&base());
    let server = Served::start(bitfit(), folder.path().to_str().unwrap(), &[]);
    let texts = [TEXT, "dog", "a bad plot . ümlaut 你好"];
    let of_task = |task: &str| {
        let input = |text: &&str| match task.starts_with("pair") {
            true => json!({"text": text, "text_pair": text}),
            false => json!({"text": text}),
        };
        let body = json!({"inputs": texts.iter().map(input).collect::<Vec<_>>()}).to_string();
        let answer = server.ask("POST", &format!("/v1/tasks/{task}/predict"), body).ok().json();
        (task.to_string(), json!({"patch": answer["patch"], "rows": answer["predictions"]}))
    };
    let tasks: serde_json::Map<String, Value> = ["a", "b", "pair", "pair-value"].map(of_task).into_iter().collect();
    python.args([&script("triton.py"), &server.address]);
    assert_eq!(run(python, &json!({"texts": texts, "tasks": tasks}).to_string()), "8 ways of asking agree\n");
}

#[test]
fn the_api_does_what_its_document_says() {
    let Some(python) = python() else { return };
    let (empty, full) = (tempfile::tempdir().unwrap(), store(&base()));
    let serve = |store: &Path| Served::start(bitfit(), store.to_str().unwrap(), &["--max-body", "20KB"]);
    let (of_nothing, server) = (serve(empty.path()), serve(full.path()));
    // Names as they come, and those of tasks that there are: `a` to ask, `b` to remove. That bytes are a patch, or that a
    // task takes two texts, no schema can say: where there are tasks, a valid body may be refused.
    let known = "[parameters]\n\"path.task\" = \"a\"\n\
        [[operations]]\ninclude-method = \"DELETE\"\nparameters = { \"path.task\" = \"b\" }\n";
    let refusing = ["--exclude-checks", "positive_data_acceptance"];
    for (asked, settings, which) in
        [(&of_nothing, "", &["--exclude-method", "PUT"]), (&server, "", &refusing), (&server, known, &refusing)]
    {
        // It reads its settings, and leaves files, where it runs.
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("schemathesis.toml"), settings).unwrap();
        let mut fuzzer = Command::new(python.get_program());
        fuzzer.args(["-m", "schemathesis.cli", "run", &format!("http://{}/openapi.json", asked.address)]);
        // The same requests at every run; what one found is not kept for the next.
        fuzzer.args(["--checks", "all", "--max-examples", "60", "--seed", "1", "--generation-database", "none"]);
        fuzzer.args(["--no-color", "--max-failures", "20"]).args(which).current_dir(folder.path());
        println!("{}", run(fuzzer, ""));
        // It finds tasks by the list of them, and removes some.
        server.ask("PUT", "/v1/tasks/b", two_classes(&base(), 2)).ok();
        server.ask("PUT", "/v1/tasks/a", two_classes(&base(), 1)).ok();
        assert_eq!(server.predict("a", TEXT).ok().json()["patch"], hash_of(&two_classes(&base(), 1)));
    }
}

#[test]
fn a_browser_shows_tasks_and_scores_by_keyboard_in_light_and_dark_and_on_a_phone() {
    let Some(mut python) = python() else { return };
    let Some(browser) = std::env::var_os("BITFIT_BROWSER").filter(|path| !path.is_empty()) else {
        println!("skipped: BITFIT_BROWSER names no Chromium");
        return;
    };
    let base = base();
    let folder = tempfile::tempdir().unwrap();
    for (name, seed) in [("mood", 1), ("tone", 2)] {
        fs::write(folder.path().join(format!("{name}.safetensors")), two_classes(&base, seed)).unwrap();
    }
    fs::write(folder.path().join("broken.safetensors"), b"no patch").unwrap();
    let server = Served::start(bitfit(), folder.path().to_str().unwrap(), &[]);
    let of_task =
        |task: &str| (task.to_string(), server.predict(task, TEXT).ok().json()["predictions"][0]["scores"].clone());
    let tasks: serde_json::Map<String, Value> = ["mood", "tone"].map(of_task).into_iter().collect();
    python.args([&script("page.py"), &format!("http://{}", server.address)]).arg(browser);
    python.args(std::env::var_os("BITFIT_SCREENSHOTS"));
    assert_eq!(run(python, &json!({"text": TEXT, "tasks": tasks}).to_string()), "4 visits\n");
}

/// A real S3 server.
struct Bucket {
    child: Child,
    asked: ChildStdin,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
    url: String,
}

impl Bucket {
    fn start(mut python: Command) -> Bucket {
        let mut child = python.arg(script("bucket.py")).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let asked = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut bucket = Bucket { child, asked, answers, url: String::new() };
        bucket.url = bucket.answer()["url"].as_str().unwrap().into();
        bucket
    }

    fn answer(&mut self) -> Value {
        let line = self.answers.next().expect("the bucket's server answers").unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn put(&mut self, key: &str, file: &Path) {
        writeln!(self.asked, "{}", json!({"put": key, "file": file})).unwrap();
        self.answer();
    }

    fn keys(&mut self) -> Vec<String> {
        writeln!(self.asked, "{}", json!({"list": true})).unwrap();
        self.answer()["keys"].as_array().unwrap().iter().map(|key| key.as_str().unwrap().to_string()).collect()
    }

    /// A replica of the server over what lies under `prod/`.
    fn serve(&self, more: &[&str]) -> Served {
        let mut command = bitfit();
        command.env("AWS_ENDPOINT_URL", &self.url).env("AWS_REGION", "us-east-1");
        command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
        Served::start(command, "s3://patches/prod", more)
    }

    fn stop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        self.stop();
    }
}

#[test]
fn replicas_share_a_bucket_and_go_on_without_it() {
    let Some(python) = python() else { return };
    let base = base();
    let local = store(&base);
    let mut bucket = Bucket::start(python);
    bucket.put("prod/a.safetensors", &local.path().join("a.safetensors"));
    bucket.put("prod/run/patch.safetensors", &local.path().join("b.safetensors"));
    bucket.put("prod/run/checkpoint/patch.safetensors", &local.path().join("b.safetensors"));
    bucket.put("other/z.safetensors", &local.path().join("b.safetensors"));
    let (first, second) = (bucket.serve(&["--poll", "0.2"]), bucket.serve(&["--poll", "0.2"]));
    let names = |server: &Served| -> Vec<String> {
        let tasks = server.ask("GET", "/v1/tasks", "").ok().json();
        tasks["tasks"].as_array().unwrap().iter().map(|task| task["task"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(names(&first), ["a", "run"]);
    assert_eq!(first.predict("a", TEXT).ok().json()["patch"], hash_of(&two_classes(&base, 1)));

    // What one takes up, the other serves.
    let [one, two] = [10, 11].map(|seed| two_classes(&base, seed));
    assert_eq!(first.ask("PUT", "/v1/tasks/new", &one).status, 201);
    assert_eq!(second.predict("new", TEXT).ok().json()["patch"], hash_of(&one));
    assert_eq!(second.ask("PUT", "/v1/tasks/new", &two).status, 200);
    served::until("the other replica sees the new version", || {
        first.predict("new", TEXT).ok().json()["patch"] == hash_of(&two)
    });
    let back = json!({"patch": hash_of(&one)}).to_string();
    first.ask("POST", "/v1/tasks/new/rollback", back).ok();
    served::until("the other replica goes back too", || {
        second.predict("new", TEXT).ok().json()["patch"] == hash_of(&one)
    });
    first.ask("PUT", "/v1/tasks/new", b"no patch").refused(422, "bad_patch");
    assert_eq!(first.ask("DELETE", "/v1/tasks/run", "").status, 204);
    served::until("a removed task is gone elsewhere", || second.predict("run", TEXT).status == 404);
    let keys = bucket.keys();
    assert!(keys.contains(&"prod/new.safetensors".to_string()) && !keys.contains(&"prod/run/patch.safetensors".into()));
    assert!(keys.contains(&format!("prod/.versions/new/{}.safetensors", hash_of(&two))), "{keys:?}");
    // Another start knows what was uploaded.
    drop(second);
    bucket.put("prod/cold.safetensors", &local.path().join("b.safetensors"));
    let second = bucket.serve(&["--poll", "0.2"]);
    assert_eq!(names(&second), ["a", "cold", "new"]);
    second.predict("new", TEXT).ok();
    served::until("a put by others is seen", || names(&first).contains(&"cold".to_string()));

    // Without the store what is loaded serves on; what is not, and changes, cannot.
    bucket.stop();
    first.predict("cold", TEXT).refused(503, "store_unreachable");
    first.ask("PUT", "/v1/tasks/new", &two).refused(503, "store_unreachable");
    std::thread::sleep(std::time::Duration::from_secs(1));
    for _ in 0..5 {
        assert_eq!(first.predict("new", TEXT).ok().json()["patch"], hash_of(&one));
        first.predict("a", TEXT).ok();
    }
    let error = first.ask("GET", "/v1/tasks", "").ok().json();
    assert_eq!(error["tasks"].as_array().unwrap().iter().filter(|task| task["state"] == "live").count(), 2);
}
