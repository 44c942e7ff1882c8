//! The read-only address, as those see it who connect to it: scrapers, browsers, and people with bad intentions.

mod common;

use common::eventually;
use common::model::Op;
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use common::vmm::everyday;
use ringblk::service::monitor::MAX_CLIENTS;
use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

fn main() -> ExitCode {
    let trials = vec![
        trial("it_shows_the_numbers_and_changes_nothing", Ok(()), |()| shows()),
        trial("a_unix_socket_has_its_mode_and_goes_with_the_service", Ok(()), |()| unix()),
        trial("hostile_clients_hold_nobody_up", Ok(()), |()| hostile()),
        trial("an_address_that_is_taken_is_told_of", Ok(()), |()| taken()),
        trial("the_board_the_alerts_and_the_documents_know_the_metrics", Ok(()), |()| names()),
        trial("promtool_has_no_objections", promtool(), objections),
    ];
    run_trials(trials)
}

/// A command of Prometheus' promtool: `scripts/test` fetches one.
fn promtool() -> Result<String, String> {
    let program = std::env::var("PROMTOOL").unwrap_or_else(|_| "promtool".into());
    let found = Command::new(&program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match found {
        Ok(status) if status.success() => Ok(program),
        other => Err(format!("{program} cannot be run: {other:?} (see PROMTOOL in scripts/test)")),
    }
}

/// A service that shows its numbers on a port of its own choice, and the port.
fn start(setup: Setup) -> (Service, SocketAddr) {
    let service = setup.args(["--metrics", "127.0.0.1:0"]).start();
    let log = service.log();
    let after = log.split_once("http://").unwrap_or_else(|| panic!("no address in {log}")).1;
    let address = after.split('/').next().unwrap().parse().unwrap();
    (service, address)
}

/// Status line, headers and body of the answer to a request as it stands.
fn ask(mut stream: impl Read + Write, request: &str) -> (String, String) {
    // Who is told that it is too much before it has said all of it has said enough.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.to_owned(), body.to_owned())
}

fn get(address: SocketAddr, path: &str) -> (String, String) {
    let stream = TcpStream::connect(address).unwrap();
    ask(stream, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"))
}

fn shows() {
    let (service, address) = start(Setup::new().volume("a", "memory:8M").vhost_user("a", "a", ""));
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.read(0, 8).0, 0);
    eventually("the request is shown", || {
        let (head, body) = get(address, "/metrics");
        assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("nosniff"), "{head}");
        body.lines().any(|line| {
            line.starts_with("ringblk_export_bytes_total{") && line.ends_with("operation=\"read\"} 4096")
        })
    });
    let (head, body) = get(address, "/v1/stats");
    assert!(head.contains("content-type: application/json"), "{head}");
    let stats: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(stats["exports"][0]["operations"]["read"]["bytes"], 4096);

    let open =
        "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: application/openmetrics-text;version=1.0.0\r\n\r\n";
    let (head, body) = ask(TcpStream::connect(address).unwrap(), open);
    assert!(head.contains("openmetrics-text") && body.ends_with("# EOF\n"), "{head}");

    for (request, status) in [
        ("POST /v1/stop HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
        ("POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n", "405"),
        ("GET /v1/stop HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
        // Paths of images and addresses of servers are nobody's business here.
        ("GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
        ("GET /../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
        ("HELO there\r\n\r\n", "400"),
        (&format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(1 << 16)), "4"),
    ] {
        let (head, _) = ask(TcpStream::connect(address).unwrap(), request);
        let answered = head.split(' ').nth(1).unwrap_or_default();
        assert!(head.is_empty() && status == "4" || answered.starts_with(status), "{request:.80}: {head}");
    }
    assert!(!service.status().stopping);
}

fn unix() {
    let setup = Setup::new().volume("a", "memory:8M").vhost_user("a", "a", "");
    let path = setup.path("metrics.sock");
    let service = setup.args(["--metrics", &format!("{},mode=0666", path.display())]).start();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
    let (_, body) = ask(UnixStream::connect(&path).unwrap(), "GET /metrics HTTP/1.0\r\n\r\n");
    assert!(body.contains("\nringblk_build_info{"), "{body}");
    service.stop();
    assert!(!path.exists());
}

fn hostile() {
    let (service, address) = start(Setup::new().volume("a", "memory:8M").vhost_user("a", "a", ""));
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let before = service.descriptors();
    // Some say nothing, some stop in the middle, some do not read what they have asked for.
    let mut crowd: Vec<_> = (0..3 * MAX_CLIENTS).map(|_| TcpStream::connect(address).unwrap()).collect();
    for (number, stream) in crowd.iter_mut().enumerate() {
        let said = ["", "GET /metr", "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"][number % 3];
        // It may have been hung up on.
        let _ = stream.write_all(said.as_bytes());
    }
    let (head, _) = get(address, "/metrics");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(service.descriptors() <= before + MAX_CLIENTS, "as many as it pleases them");
    assert_eq!((queue.read(0, 8).0, service.status().stopping), (0, false));
    // All are hung up on: the first at once, for those that came after them, and the last when their time is over.
    for mut stream in crowd {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut rest = Vec::new();
        if let Err(error) = stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        }
    }
}

fn taken() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    let setup = Setup::new().volume("a", "memory:8M").vhost_user("a", "a", "").args(["--metrics", &address]);
    let (status, said) = setup.refused();
    assert!(status == 1 && said.contains(&format!("cannot listen on {address}: ")), "{said}");
    let setup = Setup::new().volume("a", "memory:8M").vhost_user("a", "a", "").args(["--metrics", "local:1"]);
    let (status, said) = setup.refused();
    assert!(status == 2 && said.contains("--metrics local:1: write ADDRESS:PORT"), "{said}");
}

/// The metrics of a service that has something of everything.
fn of_everything() -> String {
    let setup = Setup::new()
        .volume("good", "memory:8M")
        .volume("bad", "fault:good,errors=100%,operations=write")
        .volume("slow", "memory:8M,iops-total=10")
        .vhost_user("bad", "a \"quoted\" name", "")
        .vhost_user("slow", "b", "");
    let (service, address) = start(setup);
    let service = service.may_complain();
    let (_vmm, mut queue) = everyday(&service.path("a \"quoted\" name"));
    assert_eq!((queue.read(0, 8).0, queue.write(0, &[1; 512]), queue.one(Op::Flush, &[]).0), (0, 1, 0));
    let (_, text) = get(address, "/metrics");
    assert!(text.contains("ringblk_export_errors_total{"), "{text}");
    text
}

/// Runs promtool in the directory of the rules; it is to succeed, and to say nothing against anything.
fn run_promtool(promtool: &str, args: &[&str], input: &str) {
    let mut command = Command::new(promtool);
    command.args(args).current_dir(contrib().join("prometheus"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}{}", String::from_utf8_lossy(&output.stdout));
}

fn contrib() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib")
}

/// Promtool looks at names, types and help, at the alerts, whether they come when they should, and at what the board asks for.
fn objections(promtool: String) {
    run_promtool(&promtool, &["check", "metrics"], &of_everything());
    run_promtool(&promtool, &["check", "rules", "ringblk.rules.yml"], "");
    run_promtool(&promtool, &["test", "rules", "ringblk.rules.test.yml"], "");
    let rules = board().into_iter().enumerate().map(|(number, expression)| {
        let expression = expression
            .replace("$__rate_interval", "5m")
            .replace("$__range", "1h")
            .replace("$instance", ".*")
            .replace("$volume", ".*");
        serde_json::json!({"record": format!("board:{number}"), "expr": expression})
    });
    let rules = serde_json::json!({"groups": [{"name": "board", "rules": rules.collect::<Vec<_>>()}]});
    let file = tempfile::Builder::new().suffix(".yml").tempfile().unwrap();
    fs::write(file.path(), rules.to_string()).unwrap();
    run_promtool(&promtool, &["check", "rules", file.path().to_str().unwrap()], "");
}

/// What the board asks Prometheus for.
fn board() -> Vec<String> {
    let board = fs::read_to_string(contrib().join("grafana/ringblk.json")).unwrap();
    let board: serde_json::Value = serde_json::from_str(&board).unwrap();
    let panels = board["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let found: Vec<_> = targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect();
    assert!(found.len() >= panels.len());
    found
}

fn names() {
    let rules = fs::read_to_string(contrib().join("prometheus/ringblk.rules.yml")).unwrap();
    let docs = fs::read_to_string(contrib().join("../docs/monitoring.md")).unwrap();
    let metrics = of_everything();
    let shown: BTreeSet<&str> = metrics
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    for text in board().iter().chain([&rules, &docs]) {
        for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            let is_metric = word.starts_with("ringblk_") && !word.ends_with("ringblk_");
            let of_histogram = |name: &&str| name.strip_suffix("_count") == Some(word);
            assert!(
                !is_metric || shown.contains(word) || shown.iter().any(of_histogram),
                "{word} is no metric"
            );
        }
    }
    // And the other way round: what is shown is told of.
    for name in shown {
        let family = ["_bucket", "_count", "_sum"].iter().find_map(|suffix| name.strip_suffix(suffix));
        assert!(
            docs.contains(&format!("`{}`", family.unwrap_or(name))),
            "{name} is not in docs/monitoring.md"
        );
    }
}
