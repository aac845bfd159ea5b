//! Tasks are asked and changed over HTTP: every status of the design over a real socket, and answers to the bit.

#[path = "common/command.rs"]
mod command;
#[path = "common/served.rs"]
mod served;

use std::fs;
use std::path::Path;
use std::time::Duration;

use bitfit::base::Base;
use bitfit::base::problem::{Problem, Texts};
use command::{bitfit, run, tiny};
use serde_json::{Value, json};
use served::{Client, Served, hash_of, patch, two_classes, until};

const TEXT: &str = "the movie was good";

/// A folder with tasks `a`, `b` (two classes), `pairs` (a value of two texts) and `run` (as a run's folder lies).
fn store(base: &Base) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("a.safetensors"), two_classes(base, 1)).unwrap();
    fs::write(at("b.safetensors"), two_classes(base, 2)).unwrap();
    fs::write(at("pairs.safetensors"), patch(base, "bitfit", Problem::Value, Texts::Two, 3)).unwrap();
    fs::create_dir(at("run")).unwrap();
    fs::write(at("run/patch.safetensors"), two_classes(base, 4)).unwrap();
    fs::write(at("notes.txt"), "no patch").unwrap();
    folder
}

fn base() -> Base {
    Base::from_folder(&tiny()).unwrap()
}

fn serve(store: &Path, more: &[&str]) -> Served {
    Served::start(bitfit(), store.to_str().unwrap(), more)
}

/// What the command answers with a patch file, but for the task's name.
fn alone(patch: &Path, text: &str) -> Value {
    let answer = run(["predict", "--patch", patch.to_str().unwrap(), "--text", text, "--json"]).ok();
    serde_json::from_str::<Value>(&answer.out).unwrap()["results"][0].clone()
}

#[test]
fn each_task_answers_as_the_command_does_to_the_bit() {
    let folder = store(&base());
    let server = serve(folder.path(), &[]);
    for (task, file) in [("a", "a.safetensors"), ("b", "b.safetensors"), ("run", "run/patch.safetensors")] {
        let expected = alone(&folder.path().join(file), TEXT);
        let found = server.predict(task, TEXT).ok().json();
        assert_eq!(found["task"], task);
        assert_eq!((&found["patch"], &found["predictions"]), (&expected["patch"], &expected["predictions"]));
    }
    let body = json!({"tasks": ["run", "a"], "inputs": [{"text": TEXT}, {"text": "a bad plot"}]}).to_string();
    let many = server.ask("POST", "/v1/predict", body).ok().json();
    let tasks: Vec<&Value> = many["results"].as_array().unwrap().iter().map(|r| &r["task"]).collect();
    assert_eq!(tasks, ["run", "a"]);
    assert_eq!(many["results"][1]["predictions"][0], server.predict("a", TEXT).json()["predictions"][0]);
    let pair = json!({"inputs": [{"text": TEXT, "text_pair": "the plot was bad"}]}).to_string();
    assert!(server.ask("POST", "/v1/tasks/pairs/predict", pair).ok().json()["predictions"][0]["value"].is_f64());
}

#[test]
fn the_routes_of_text_embeddings_inference_answer_as_its_clients_expect() {
    let folder = store(&base());
    let server = serve(folder.path(), &[]);
    let own = server.predict("a", TEXT).json()["predictions"][0].clone();
    let rows = |inputs: Value| {
        let body = json!({"inputs": inputs, "task": "a", "truncate": true}).to_string();
        server.ask("POST", "/predict", body).ok().json()
    };
    let one = rows(json!(TEXT));
    assert_eq!((&one[0]["label"], &one[0]["score"]), (&own["label"], &own["score"]));
    assert!(one[0]["score"].as_f64() > one[1]["score"].as_f64());
    assert_eq!(rows(json!([[TEXT], ["bad"]]))[0], one);
    server.ask("POST", "/predict", json!({"inputs": [TEXT, "two"], "task": "a"}).to_string()).refused(422, "invalid");
    server.ask("POST", "/predict", json!({"inputs": TEXT}).to_string()).refused(422, "invalid");
    assert_eq!(server.ask("GET", "/health", "").status, 200);
    let info = server.ask("GET", "/info", "").ok().json();
    assert_eq!((&info["model_dtype"], &info["live_tasks"]), (&json!("f32"), &json!(1)));
}

#[test]
fn what_cannot_be_done_says_so_with_its_status() {
    let folder = store(&base());
    fs::write(folder.path().join("broken.safetensors"), b"no patch").unwrap();
    let server =
        serve(folder.path(), &["--max-body", "10KB", "--max-text", "1KB", "--max-inputs", "8", "--queue", "16"]);
    let ask = |path: &str, body: &str| server.ask("POST", path, body);
    let one = "/v1/tasks/a/predict";
    for body in ["", "{", "{\"inputs\"", "nonsense", "{\"inputs\": [{\"text\": \"a\\"] {
        ask(one, body).refused(400, "malformed");
    }
    server.ask("POST", one, [b'"', 0xff, b'"']).refused(400, "malformed");
    ask(one, &"[".repeat(5000)).refused(400, "malformed");
    for body in [
        json!({"inputs": []}),
        json!({"inputs": "text"}),
        json!({"inputs": [{"text": ""}]}),
        json!({"inputs": [{"text": 1}]}),
        json!({"inputs": [{"text": "a", "text_pair": "b"}]}),
        json!({"inputs": [{"text": "a", "pair": "b"}]}),
        json!([1]),
        json!([[["a", null]]]),
        json!({"inputs": [["a", null]]}),
    ] {
        ask(one, &body.to_string()).refused(422, "invalid");
    }
    let text = json!({"inputs": [{"text": "a"}]}).to_string();
    ask("/v1/tasks/pairs/predict", &text).refused(422, "invalid");
    for name in ["nobody", "..", "%2e%2e%2fa", ".versions", "a%00", &"x".repeat(65), "%ff"] {
        ask(&format!("/v1/tasks/{name}/predict"), &text).refused(404, "unknown_task");
    }
    ask("/v1/predict", &json!({"tasks": ["a", "nobody"], "inputs": [{"text": "a"}]}).to_string())
        .refused(404, "unknown_task");
    ask("/v1/predict", &json!({"tasks": ["a", "a"], "inputs": [{"text": "a"}]}).to_string()).refused(422, "invalid");
    ask("/v1/nowhere", "").refused(404, "unknown_route");
    let zipped = Client::new(&server.address).ask("POST", one, &[("content-encoding", "gzip")], text.as_bytes());
    zipped.refused(415, "encoded");
    // Many names are looked through once, and an output is made once.
    let names: Vec<String> = (0..2000).map(|i| format!("t{i}")).collect();
    ask("/v1/predict", &json!({"tasks": names, "inputs": [{"text": "a"}]}).to_string()).refused(413, "too_large");
    let infer = |outputs: &[&str]| {
        let outputs: Vec<Value> = outputs.iter().map(|name| json!({"name": name})).collect();
        let text = json!({"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]});
        ask("/v2/models/a/infer", &json!({"inputs": [text], "outputs": outputs}).to_string())
    };
    assert_eq!(infer(&["score", "label", "logits"]).ok().json()["outputs"].as_array().unwrap().len(), 3);
    // Errors of this protocol have its form, whoever finds them.
    for (reply, status) in [
        (infer(&["score", "score"]), 422),
        (infer(&["score", "logits", "label", "more"]), 422),
        (ask("/v2/models/a/infer", "{"), 400),
        (ask("/v2/models/a/infer", &" ".repeat(20_000)), 413),
        (ask("/v2/models/%ff/infer", "{}"), 404),
        (ask("/v2/nowhere", ""), 404),
        (server.ask("PUT", "/v2/models/a/infer", ""), 405),
    ] {
        assert_eq!(reply.status, status, "{}", String::from_utf8_lossy(&reply.body));
        assert!(reply.json()["error"].as_str().is_some_and(|message| !message.is_empty()), "{}", reply.json());
    }
    server.ask("PUT", one, "").refused(405, "unknown_method");
    ask("/v1/tasks/broken/predict", &text).refused(422, "bad_patch");
    ask(one, &json!({"inputs": [{"text": "a".repeat(20_000)}]}).to_string()).refused(413, "too_large");
    ask(one, &json!({"inputs": [{"text": "a".repeat(2_000)}]}).to_string()).refused(413, "too_large");
    ask(one, &json!({"inputs": vec![json!({"text": "a"}); 9]}).to_string()).refused(413, "too_large");
    let many = json!({"tasks": ["a", "b", "run"], "inputs": vec![json!({"text": "a"}); 8]}).to_string();
    ask("/v1/predict", &many).refused(413, "too_large");
    let mut client = Client::new(&server.address);
    client.ask("POST", one, &[("x-deadline-ms", "soon")], text.as_bytes()).refused(422, "invalid");
    let reply = client.ask("POST", one, &[("x-request-id", "mine")], text.as_bytes()).ok();
    assert_eq!(reply.header("x-request-id"), Some("mine"));
    assert!(server.predict("a", TEXT).ok().header("x-request-id").is_some());
}

#[test]
fn a_patch_for_another_base_or_of_weights_is_refused_by_name() {
    let base = base();
    let folder = store(&base);
    let server = serve(folder.path(), &[]);
    let mut other = two_classes(&base, 5);
    let (ours, theirs) = (base.fingerprint().to_string(), "0".repeat(64));
    let text = String::from_utf8_lossy(&other[8..600]).into_owned();
    assert!(text.contains(&ours), "the fingerprint stands in the header");
    let at = other.windows(64).position(|w| w == ours.as_bytes()).unwrap();
    other[at..at + 64].copy_from_slice(theirs.as_bytes());
    // Its hash no longer fits either: a file that was changed.
    server.ask("PUT", "/v1/tasks/a", &other).refused(422, "bad_patch");
    let wrong = {
        let base = Base::random(base.config().clone(), 9);
        let metadata = bitfit::patch::Patch::from_bytes(&two_classes(&self::base(), 1), Path::new("a")).unwrap();
        let (mut about, delta) = (metadata.metadata().clone(), metadata.delta().clone());
        about.base_fingerprint = base.fingerprint().into();
        let patch = bitfit::patch::Patch::new(about, delta, base.config(), base.has_pooler()).unwrap();
        patch.to_bytes(bitfit::patch::Dtype::F32).unwrap()
    };
    server.ask("PUT", "/v1/tasks/a", &wrong).refused(409, "wrong_base");
    let classes = || Problem::Classes(vec!["bad".into(), "good".into()]);
    let weights = patch(&base, "random count=50 seed=1", classes(), Texts::One, 6);
    server.ask("PUT", "/v1/tasks/a", &weights).refused(422, "invalid");
    server.ask("PUT", "/v1/tasks/.hidden", two_classes(&base, 1)).refused(404, "unknown_task");
    server.ask("PUT", "/v1/tasks/new", b"no patch").refused(422, "bad_patch");
    assert_eq!(server.predict("new", TEXT).status, 404);
    assert_eq!(server.predict("a", TEXT).json()["patch"], hash_of(&two_classes(&base, 1)));
}

#[test]
fn keys_decide_who_may_ask_and_who_may_change() {
    let folder = store(&base());
    // SHA-256 of "abc" and of "admin".
    let keys = "read ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad the page\n\
                admin 8c6976e5b5410415bde908bd4dee15dfb167a9c873fc4bb8a81f6f2ab448a918 us\n";
    let file = folder.path().join("keys");
    fs::write(&file, keys).unwrap();
    let server = serve(folder.path(), &["--api-keys", file.to_str().unwrap()]);
    let text = json!({"inputs": [{"text": "a"}]}).to_string();
    let ask = |method: &str, path: &str, key: &str| {
        let header = format!("Bearer {key}");
        Client::new(&server.address).ask(method, path, &[("authorization", &header)], text.as_bytes())
    };
    let one = "/v1/tasks/a/predict";
    server.ask("POST", one, &text).refused(401, "unauthorized");
    ask("POST", one, "wrong").refused(401, "unauthorized");
    ask("POST", one, "abc").ok();
    ask("DELETE", "/v1/tasks/a", "abc").refused(403, "forbidden");
    ask("DELETE", "/v1/tasks/a", "admin").ok();
    for open in ["/health", "/", "/docs", "/openapi.json", "/v2/health/ready", "/metrics"] {
        assert_eq!(server.ask("GET", open, "").status, 200, "{open}");
    }
    for closed in ["/v1/tasks", "/info", "/v2/models/b"] {
        assert_eq!(server.ask("GET", closed, "").status, 401, "{closed}");
        let is_protocol = closed.starts_with("/v2");
        assert_eq!(server.ask("GET", closed, "").json()["error"].is_string(), is_protocol, "{closed}");
    }
}

#[test]
fn tasks_are_uploaded_replaced_rolled_back_and_removed_and_a_restart_loses_nothing() {
    let base = base();
    let folder = store(&base);
    let server = serve(folder.path(), &[]);
    let [first, second] = [11, 12].map(|seed| two_classes(&base, seed));
    let put = |bytes: &[u8]| server.ask("PUT", "/v1/tasks/new", bytes);
    let about = put(&first);
    assert_eq!((about.status, &about.json()["patch"]), (201, &json!(hash_of(&first))));
    assert_eq!(about.json()["labels"], json!(["bad", "good"]));
    assert_eq!(put(&second).status, 200);
    assert_eq!(server.predict("new", TEXT).ok().json()["patch"], hash_of(&second));
    let versions = server.ask("GET", "/v1/tasks/new/versions", "").ok().json();
    let of = |versions: &Value| {
        versions["versions"].as_array().unwrap().iter().map(|v| v["patch"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(&versions), [hash_of(&second), hash_of(&first)]);
    assert_eq!(versions["versions"][0]["live"], true);

    let back = |hash: &str| server.ask("POST", "/v1/tasks/new/rollback", json!({"patch": hash}).to_string());
    back(&"0".repeat(64)).refused(404, "unknown_version");
    back("../../a").refused(404, "unknown_version");
    assert_eq!(back(&hash_of(&first)).ok().json()["patch"], hash_of(&first));
    assert_eq!(server.predict("new", TEXT).ok().json()["patch"], hash_of(&first));
    assert_eq!(fs::read(folder.path().join("new.safetensors")).unwrap(), first);

    // What was there before the first upload is a version too, and a removed task comes back from one.
    server.ask("PUT", "/v1/tasks/run", &first).ok();
    assert_eq!(fs::read(folder.path().join("run/patch.safetensors")).unwrap(), first, "replaced where it lay");
    assert_eq!(of(&server.ask("GET", "/v1/tasks/run/versions", "").json()).len(), 2);
    assert_eq!(server.ask("DELETE", "/v1/tasks/new", "").status, 204);
    server.predict("new", TEXT).refused(404, "unknown_task");
    server.ask("DELETE", "/v1/tasks/new", "").refused(404, "unknown_task");
    let listed = |server: &Served| -> Vec<String> {
        let tasks = server.ask("GET", "/v1/tasks", "").ok().json();
        tasks["tasks"].as_array().unwrap().iter().map(|t| t["task"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(listed(&server), ["a", "b", "pairs", "run"]);
    assert_eq!(back(&hash_of(&second)).ok().json()["patch"], hash_of(&second));

    // Killed without warning, and started again.
    drop(server);
    let server = serve(folder.path(), &["--read-only"]);
    assert_eq!(server.predict("new", TEXT).ok().json()["patch"], hash_of(&second));
    assert_eq!(server.predict("run", TEXT).ok().json()["patch"], hash_of(&first));
    server.ask("PUT", "/v1/tasks/new", &first).refused(403, "read_only");
}

#[test]
fn a_task_with_a_file_at_either_path_is_removed_whole_and_both_are_kept() {
    let base = base();
    let folder = store(&base);
    fs::write(folder.path().join("run.safetensors"), two_classes(&base, 7)).unwrap();
    let server = serve(folder.path(), &[]);
    assert_eq!(server.predict("run", TEXT).ok().json()["patch"], hash_of(&two_classes(&base, 7)));
    assert_eq!(server.ask("DELETE", "/v1/tasks/run", "").status, 204);
    server.predict("run", TEXT).refused(404, "unknown_task");
    assert!(!folder.path().join("run/patch.safetensors").exists());
    for seed in [4, 7] {
        let back = json!({"patch": hash_of(&two_classes(&base, seed))}).to_string();
        server.ask("POST", "/v1/tasks/run/rollback", back).ok();
    }
}

#[test]
fn a_file_too_large_for_a_patch_is_refused_unread_and_can_be_replaced() {
    let base = base();
    let folder = store(&base);
    fs::File::create(folder.path().join("huge.safetensors")).unwrap().set_len(65 << 20).unwrap();
    let server = serve(folder.path(), &[]);
    server.predict("huge", TEXT).refused(422, "bad_patch");
    let task = server.ask("GET", "/v1/tasks", "").ok().json();
    assert!(task["tasks"].as_array().unwrap().iter().any(|t| t["task"] == "huge" && t["state"] == "refused"), "{task}");
    server.ask("PUT", "/v1/tasks/huge", two_classes(&base, 8)).ok();
    assert_eq!(server.predict("huge", TEXT).ok().json()["patch"], hash_of(&two_classes(&base, 8)));
}

#[test]
fn the_folder_is_watched_and_a_bad_file_leaves_the_old_version_serving() {
    let base = base();
    let folder = store(&base);
    let server = serve(folder.path(), &["--poll", "0.1"]);
    let patch_of = |task: &str| server.predict(task, TEXT).ok().json()["patch"].clone();
    let before = patch_of("a");
    // A name that is new in the store is found when it is asked for.
    fs::write(folder.path().join("late.safetensors"), two_classes(&base, 20)).unwrap();
    assert_eq!(patch_of("late"), hash_of(&two_classes(&base, 20)));

    fs::write(folder.path().join("a.safetensors"), b"half a patch").unwrap();
    let error = || server.ask("GET", "/v1/tasks/a", "").json()["error"].as_str().map(String::from);
    until("the bad file is reported", || error().is_some());
    assert_eq!(patch_of("a"), before);
    fs::write(folder.path().join("a.safetensors"), two_classes(&base, 21)).unwrap();
    until("the good file is taken", || patch_of("a") == hash_of(&two_classes(&base, 21)));
    assert_eq!(error(), None);
    fs::remove_file(folder.path().join("a.safetensors")).unwrap();
    until("the removed task is gone", || server.predict("a", TEXT).status == 404);
}

#[test]
fn patches_are_dropped_by_least_recent_use_and_come_back_when_asked() {
    let folder = store(&base());
    let size =
        serve(folder.path(), &["--pin", "b"]).ask("GET", "/v1/tasks/b", "").json()["size_bytes"].as_u64().unwrap();
    let memory = (2 * size + size / 2).to_string();
    let server = serve(folder.path(), &["--patch-memory", &memory, "--pin", "b"]);
    let live = || -> Vec<String> {
        let tasks = server.ask("GET", "/v1/tasks", "").json();
        let live = tasks["tasks"].as_array().unwrap().iter().filter(|t| t["state"] == "live");
        live.map(|t| t["task"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(live(), ["b"]);
    let expected = server.predict("a", TEXT).ok().json();
    assert_eq!(live(), ["a", "b"]);
    server.predict("run", TEXT).ok();
    assert_eq!(live(), ["b", "run"]);
    assert_eq!(server.predict("a", TEXT).ok().json(), expected);
    server.ask("DELETE", "/v1/tasks/b", "").refused(422, "invalid");
    drop(server);
    let mut tight = bitfit();
    tight.args(["serve", "--patches", folder.path().to_str().unwrap(), "--listen", "127.0.0.1:0", "--pin", "b"]);
    let answer: command::Answer = tight.args(["--patch-memory", "10"]).output().unwrap().into();
    answer.refused(2, &["--pin b", "--patch-memory"]);
}

#[test]
fn a_full_queue_answers_429_and_a_passed_deadline_504() {
    let folder = store(&base());
    let server = serve(folder.path(), &["--queue", "600", "--batch-tokens", "32"]);
    let text = json!({"inputs": vec![json!({"text": "the movie was very good ".repeat(8)}); 400]}).to_string();
    let one = "/v1/tasks/a/predict";
    let mut late = Client::new(&server.address);
    late.ask("POST", one, &[("x-deadline-ms", "1")], text.as_bytes()).refused(504, "deadline");
    let mut clients: Vec<Client> = (0..4).map(|_| Client::new(&server.address)).collect();
    clients.iter_mut().for_each(|client| client.send("POST", one, &[], text.as_bytes()));
    let replies: Vec<_> = clients.iter_mut().map(|client| client.reply().unwrap()).collect();
    let full: Vec<_> = replies.iter().filter(|reply| reply.status == 429).collect();
    assert!(!full.is_empty() && full.len() < 4, "{:?}", replies.iter().map(|r| r.status).collect::<Vec<_>>());
    full[0].refused(429, "queue_full");
    assert!(full[0].header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
}

#[test]
fn sigterm_answers_what_was_accepted() {
    let folder = store(&base());
    let mut server = serve(folder.path(), &["--batch-tokens", "32"]);
    let text = json!({"inputs": vec![json!({"text": "the movie was very good ".repeat(8)}); 1000]}).to_string();
    let mut clients: Vec<Client> = (0..4).map(|_| Client::new(&server.address)).collect();
    let mut watching = Client::new(&server.address);
    clients.iter_mut().for_each(|client| client.send("POST", "/v1/tasks/a/predict", &[], text.as_bytes()));
    // Accepted, once the queue counts them.
    until("the requests are in the queue", || {
        watching.ask("GET", "/info", &[], b"").json()["queue"]["questions"].as_u64() >= Some(1)
    });
    server.signal("-TERM");
    for client in &mut clients {
        let reply = client.reply().expect("an accepted request is answered").ok();
        assert_eq!(reply.json()["predictions"].as_array().unwrap().len(), 1000);
    }
    assert_eq!(server.ended(Duration::from_secs(30)), Some(0));
}

#[test]
fn metrics_and_the_document_of_the_api_are_there() {
    let folder = store(&base());
    let server = serve(folder.path(), &[]);
    server.predict("a", TEXT).ok();
    let metrics = String::from_utf8(server.ask("GET", "/metrics", "").ok().body).unwrap();
    for name in
        ["bitfit_questions_total 1", "bitfit_live_tasks 1", "bitfit_queue_questions 0", "bitfit_request_seconds_bucket"]
    {
        assert!(metrics.contains(name), "{name} is in\n{metrics}");
    }
    let document = server.ask("GET", "/openapi.json", "").ok().json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    for path in ["/v1/predict", "/v1/tasks/{task}", "/v1/tasks/{task}/predict", "/predict", "/health"] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
}
