//! What goes wrong around a server: a full disk, a store that has died, slow clients, a kill without warning.

#[path = "common/command.rs"]
mod command;
#[path = "common/served.rs"]
mod served;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bitfit::base::Base;
use command::{bitfit, tiny};
use serde_json::json;
use served::{Client, Served, hash_of, two_classes, until};

const TEXT: &str = "the movie was good";
const ASK_A: &str = "/v1/tasks/a/predict";

fn base() -> Base {
    Base::from_folder(&tiny()).unwrap()
}

/// A folder with task `a`.
fn store(base: &Base) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.safetensors"), two_classes(base, 1)).unwrap();
    folder
}

/// The server in a namespace of its own, in which `disk` is a disk with `kilobytes` of room and task `a` on it.
fn on_a_small_disk(disk: &std::path::Path, patch: &std::path::Path, kilobytes: usize) -> Option<Command> {
    let mount = format!("mount -t tmpfs -o size={kilobytes}k none \"$0\"");
    let can = Command::new("unshare").args(["-rm", "sh", "-c", &mount]).arg(disk).stderr(Stdio::null()).status();
    if !can.is_ok_and(|status| status.success()) {
        println!("skipped: this system gives no small disk (unshare -rm, mount -t tmpfs)");
        return None;
    }
    let plain = bitfit();
    let mut command = Command::new("unshare");
    let run = format!("{mount} && cp \"$1\" \"$0\"/a.safetensors && shift && exec \"$@\"");
    command.args(["-rm", "sh", "-c", &run]).arg(disk).arg(patch).arg(plain.get_program());
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Some(command)
}

#[test]
fn a_full_disk_refuses_an_upload_and_the_old_version_serves_on() {
    let base = base();
    let outside = store(&base);
    let disk = tempfile::tempdir().unwrap();
    let size = two_classes(&base, 1).len();
    let Some(command) = on_a_small_disk(disk.path(), &outside.path().join("a.safetensors"), 8 * size / 1024) else {
        return;
    };
    let server = Served::start(command, disk.path().to_str().unwrap(), &["--poll", "0.1"]);
    let mut held = server.predict("a", TEXT).ok().json();
    let mut refused = 0;
    for seed in 10..30 {
        let bytes = two_classes(&base, seed);
        let reply = server.ask("PUT", "/v1/tasks/a", &bytes);
        if reply.status == 507 {
            reply.refused(507, "store_full");
            refused += 1;
        } else {
            assert_eq!(reply.ok().json()["patch"], hash_of(&bytes));
            assert_eq!(refused, 0, "there was no room, and then there was");
            held = server.predict("a", TEXT).ok().json();
        }
        // What serves is what was last taken, and stays so when the store is looked at.
        assert_eq!(server.predict("a", TEXT).ok().json(), held);
    }
    assert!(refused > 5, "the disk was full for {refused} uploads");
    server.ask("PUT", "/v1/tasks/b", two_classes(&base, 40)).refused(507, "store_full");
    server.predict("b", TEXT).refused(404, "unknown_task");
    std::thread::sleep(Duration::from_millis(500));
    server.ask("PUT", "/v1/tasks/a", b"").ok();
    assert_eq!(server.predict("a", TEXT).ok().json(), held, "what lies in the store is whole");
    let task = server.ask("GET", "/v1/tasks/a", "").ok().json();
    assert!(task["error"].is_null(), "{task}");
}

/// Any HTTP server that hands out files.
struct Files {
    child: Child,
    url: String,
}

impl Files {
    fn start(folder: &std::path::Path) -> Files {
        let mut python = Command::new("python3");
        python.args(["-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]).current_dir(folder);
        let mut child = python.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.split("port ").nth(1).and_then(|rest| rest.split(' ').next()).expect(&line);
        Files { child, url: format!("http://127.0.0.1:{port}") }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn patches_come_over_http_and_loaded_tasks_outlive_their_source() {
    let base = base();
    let folder = store(&base);
    fs::create_dir(folder.path().join("run")).unwrap();
    fs::write(folder.path().join("run/patch.safetensors"), two_classes(&base, 2)).unwrap();
    fs::write(folder.path().join("late.safetensors"), two_classes(&base, 3)).unwrap();
    let files = Files::start(folder.path());
    let server = Served::start(bitfit(), &files.url, &["--poll", "0.2"]);
    assert_eq!(server.predict("a", TEXT).ok().json()["patch"], hash_of(&two_classes(&base, 1)));
    assert_eq!(server.predict("run", TEXT).ok().json()["patch"], hash_of(&two_classes(&base, 2)));
    server.predict("nobody", TEXT).refused(404, "unknown_task");
    let whole = two_classes(&base, 5);
    fs::write(folder.path().join("copied.safetensors"), &whole[..whole.len() / 2]).unwrap();
    server.predict("copied", TEXT).refused(422, "bad_patch");
    server.ask("PUT", "/v1/tasks/a", two_classes(&base, 9)).refused(422, "invalid");
    // Files are told apart by their second.
    std::thread::sleep(Duration::from_millis(1100));
    fs::write(folder.path().join("copied.safetensors"), &whole).unwrap();
    fs::write(folder.path().join("a.safetensors"), two_classes(&base, 4)).unwrap();
    until("the new version is fetched", || {
        server.predict("a", TEXT).ok().json()["patch"] == hash_of(&two_classes(&base, 4))
    });
    until("a file that was half there is looked at again", || server.predict("copied", TEXT).status == 200);
    drop(files);
    server.predict("late", TEXT).refused(503, "store_unreachable");
    for task in ["a", "run"] {
        server.predict(task, TEXT).ok();
    }
}

#[test]
fn slow_clients_hold_nobody_up() {
    let folder = store(&base());
    let server = Served::start(bitfit(), folder.path().to_str().unwrap(), &["--max-connections", "100"]);
    let expected = server.predict("a", TEXT).ok().json();
    let many = json!({"inputs": vec![json!({"text": TEXT}); 1000]}).to_string();
    let head = format!("POST {ASK_A} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", many.len());
    let mut held = Vec::new();
    for i in 0..60 {
        let mut client = Client::new(&server.address);
        match i % 3 {
            // Half a head, half a body, and answers that nobody reads, one behind the other.
            0 => client.raw(&head.as_bytes()[..40]),
            1 => client.raw(&[head.as_bytes(), &many.as_bytes()[..many.len() / 2]].concat()),
            _ => client.raw(&[head.as_bytes(), many.as_bytes()].concat()),
        }
        held.push(client);
    }
    for _ in 0..50 {
        assert_eq!(server.predict("a", TEXT).ok().json(), expected);
    }
    // Those that come back to it are answered like anyone.
    let mut late = held.swap_remove(1);
    late.raw(&many.as_bytes()[many.len() / 2..]);
    assert_eq!(late.reply().unwrap().ok().json()["predictions"].as_array().unwrap().len(), 1000);
}

#[test]
fn a_server_killed_under_load_serves_what_was_uploaded_when_it_starts_again() {
    let base = base();
    let folder = store(&base);
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    for round in 0..3 {
        let mut server = Served::start(bitfit(), folder.path().to_str().unwrap(), &[]);
        let [one, two] = [1, 2].map(|seed| two_classes(&base, 100 + 10 * round + seed));
        stop.store(false, Ordering::Relaxed);
        let acknowledged = std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut client = Client::new(&server.address);
                    let body = json!({"inputs": [{"text": TEXT}]}).to_string();
                    while !stop.load(Ordering::Relaxed) {
                        client.send("POST", ASK_A, &[], body.as_bytes());
                        let Some(reply) = client.reply() else { break };
                        reply.ok();
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let uploads = scope.spawn(|| {
                let mut client = Client::new(&server.address);
                let mut last = None;
                for bytes in [&one, &two].into_iter().cycle() {
                    client.send("PUT", "/v1/tasks/new", &[], bytes);
                    let Some(reply) = client.reply() else { break };
                    reply.ok();
                    last = Some(hash_of(bytes));
                }
                last
            });
            std::thread::sleep(Duration::from_millis(700));
            server.signal("-KILL");
            let last = uploads.join().unwrap();
            stop.store(true, Ordering::Relaxed);
            last
        });
        server.ended(Duration::from_secs(10));
        let last = acknowledged.expect("an upload was acknowledged");
        let again = Served::start(bitfit(), folder.path().to_str().unwrap(), &["--preload"]);
        let found = again.predict("new", TEXT).ok().json()["patch"].as_str().unwrap().to_string();
        // The one that was acknowledged last, or the next, whose answer the kill cut off.
        let next = if last == hash_of(&one) { hash_of(&two) } else { hash_of(&one) };
        assert!([&last, &next].contains(&&found), "{found}");
        again.predict("a", TEXT).ok();
        let tasks = again.ask("GET", "/v1/tasks", "").ok().json();
        assert!(tasks["tasks"].as_array().unwrap().iter().all(|task| task["state"] == "live"), "{tasks}");
    }
    assert!(answered.into_inner() > 30);
    // Nothing half-written is taken for a task, and what was left aside is little.
    let stray = fs::read_dir(folder.path()).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
        !["a.safetensors", "new.safetensors", ".versions"].contains(&name.as_str())
    });
    assert!(stray.count() <= 3);
}

#[test]
fn a_server_that_still_loads_its_base_stops_when_it_is_told_to() {
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (cache, store) = (tempfile::tempdir().unwrap(), store(&base()));
    let mut command = bitfit();
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", format!("http://{}", hub.local_addr().unwrap()));
    command.env("HF_HOME", cache.path()).args(["serve", "--base", "org/name", "--listen", "127.0.0.1:0", "--patches"]);
    let mut child = command.arg(store.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // It asks, and is never answered.
    let _asked = hub.accept().unwrap();
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    until("it ends", || child.try_wait().unwrap().is_some());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_folder_that_is_gone_is_a_store_that_does_not_answer() {
    let base = base();
    let folder = store(&base);
    let (place, away) = (folder.path().join("patches"), folder.path().join("away"));
    fs::create_dir(&place).unwrap();
    for task in ["a", "b"] {
        fs::copy(folder.path().join("a.safetensors"), place.join(format!("{task}.safetensors"))).unwrap();
    }
    let server = Served::start(bitfit(), place.to_str().unwrap(), &["--poll", "0.1"]);
    let held = server.predict("a", TEXT).ok().json();
    fs::rename(&place, &away).unwrap();
    server.predict("b", TEXT).refused(503, "store_unreachable");
    server.predict("nobody", TEXT).refused(503, "store_unreachable");
    for (method, body) in [("DELETE", &b""[..]), ("PUT", b""), ("PUT", &two_classes(&base, 2))] {
        server.ask(method, "/v1/tasks/a", body).refused(503, "store_unreachable");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(server.predict("a", TEXT).ok().json(), held);
    fs::rename(&away, &place).unwrap();
    until("it is there again", || server.predict("b", TEXT).status == 200);
}

#[cfg(unix)]
#[test]
fn links_in_the_folder_harm_no_other_task_and_are_not_written_through() {
    let base = base();
    let folder = store(&base);
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("patch.safetensors");
    fs::write(&file, two_classes(&base, 2)).unwrap();
    let link = |to: &std::path::Path, name: &str| {
        std::os::unix::fs::symlink(to, folder.path().join(format!("{name}.safetensors"))).unwrap();
    };
    link("loop.safetensors".as_ref(), "loop");
    link(&file, "linked");
    let server = Served::start(bitfit(), folder.path().to_str().unwrap(), &["--poll", "0.1", "--preload"]);
    server.predict("loop", TEXT).refused(503, "store_unreachable");
    assert_eq!(server.predict("linked", TEXT).ok().json()["patch"], hash_of(&two_classes(&base, 2)));
    server.ask("PUT", "/v1/tasks/linked", two_classes(&base, 3)).ok();
    assert_eq!(fs::read(&file).unwrap(), two_classes(&base, 2));
    fs::write(folder.path().join("a.safetensors"), two_classes(&base, 4)).unwrap();
    until("the folder is watched on", || {
        server.predict("a", TEXT).ok().json()["patch"] == hash_of(&two_classes(&base, 4))
    });
}

#[test]
fn a_version_whose_file_was_damaged_is_not_dropped_for_others() {
    let base = base();
    let folder = store(&base);
    for task in ["b", "c", "d"] {
        fs::write(folder.path().join(format!("{task}.safetensors")), two_classes(&base, 5)).unwrap();
    }
    let one = Served::start(bitfit(), folder.path().to_str().unwrap(), &["--pin", "b"]);
    let size = one.ask("GET", "/v1/tasks/b", "").json()["size_bytes"].as_u64().unwrap();
    drop(one);
    let memory = (2 * size + size / 2).to_string();
    let server =
        Served::start(bitfit(), folder.path().to_str().unwrap(), &["--poll", "0.1", "--patch-memory", &memory]);
    let held = server.predict("a", TEXT).ok().json();
    fs::write(folder.path().join("a.safetensors"), b"damaged").unwrap();
    until("it is reported", || !server.ask("GET", "/v1/tasks/a", "").ok().json()["error"].is_null());
    for task in ["b", "c", "d", "b"] {
        server.predict(task, TEXT).ok();
    }
    assert_eq!(server.predict("a", TEXT).ok().json(), held);
}
