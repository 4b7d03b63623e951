//! A ledger of its own for each test, and the binary run against it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

/// A folder with a ledger, removed afterwards.
pub struct Books {
    folder: tempfile::TempDir,
}

/// What a run of the binary gave.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Books {
    pub fn new() -> Books {
        Books { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farthing"));
        command.arg("--data").arg(self.data()).args(args);
        for name in ["FARTHING_CONFIG", "FARTHING_DATA", "FARTHING_LOG"] {
            command.env_remove(name);
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).output().unwrap())
    }

    /// Runs with `--json` and reads the document; the command has to succeed.
    pub fn json(&self, args: &[&str]) -> Value {
        let ran = self.run(&[args, &["--json"]].concat());
        assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.out, ran.err);
        serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{args:?}: {error}: {}", ran.out))
    }
}

impl Ran {
    fn of(output: Output) -> Ran {
        Ran {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The run failed with one clear line that contains `part`.
    #[track_caller]
    pub fn fails_with(&self, part: &str) {
        assert_ne!(self.code, 0, "{self:?}");
        assert!(self.err.contains(part), "`{part}` is not in {self:?}");
        assert_eq!(self.err.lines().count(), 1, "{self:?}");
    }
}

/// A server in the background, stopped afterwards.
pub struct Served {
    child: Child,
    pub admin: SocketAddr,
    pub gateway: SocketAddr,
    log: PathBuf,
}

impl Served {
    /// Starts `farthing serve` on free ports; `more` is appended to the configuration.
    pub fn start(books: &Books, admin: &str, more: &str) -> Served {
        let (gateway_address, admin_address) = (free(), free());
        let config = format!(
            "[gateway]\nlisten = \"{gateway_address}\"\n[admin]\nlisten = \"{admin_address}\"\n{admin}\n{more}\n"
        );
        let config = books.write("serve.toml", config);
        let mut command = books.command(&["serve", "--config", &config]);
        let log = std::fs::File::create(books.path("serve.log")).unwrap();
        command.env("ADMIN", "s3cret").env("FARTHING_LOG", "trace").stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap();
        let log = books.path("serve.log");
        let mut served = Served { child, admin: admin_address, gateway: gateway_address, log };
        for _ in 0..600 {
            if TcpStream::connect(admin_address).is_ok() {
                return served;
            }
            assert!(served.child.try_wait().unwrap().is_none(), "the server ended: {}", served.errors());
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the server does not answer");
    }

    fn errors(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Sends a request to the admin listener: status, head, body.
    pub fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
        ask(self.admin, method, path, headers, body)
    }

    /// Has it read its configuration again, with `more` at the end.
    pub fn reload(&self, books: &Books, more: &str) {
        let file = books.path("serve.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, format!("{text}{more}")).unwrap();
        assert!(Command::new("kill").args(["-HUP", &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Stops it with SIGTERM and waits for the end of its drain.
    pub fn stop(self) -> i32 {
        self.stop_and_read().0
    }

    /// Stops it as [`stop`](Served::stop) does, and gives all that it logged, at every level.
    pub fn stop_and_read(mut self) -> (i32, String) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        (code, self.errors())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One HTTP/1.1 request on a connection of its own.
pub fn ask(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let host = if headers.to_lowercase().contains("host:") { String::new() } else { format!("host: {address}\r\n") };
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\n{host}connection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, head.to_lowercase(), body.to_owned())
}

/// An address that nobody listens on.
pub fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Lines of a text file.
pub fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}
