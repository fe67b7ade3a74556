//! A private PostgreSQL for tests: found on this machine, started once per test process on a Unix socket in a temporary
//! directory, stopped with the process however that ends. Each test gets a database of its own.
//!
//! Where none can be found the tests fail and say how to get one; they are never skipped.

use std::{
    ffi::CString,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use sqlx::{ConnectOptions, Connection, postgres::PgConnectOptions};

/// `nobody`: initdb and postgres refuse to run as root.
const NOBODY: u32 = 65534;

const HOW_TO: &str = "no PostgreSQL was found: install it (Debian, Ubuntu: `apt-get install postgresql`; or \
    `pip install pgserver`), or set WEIR_TEST_PG_BIN to the directory that holds `initdb` and `postgres`";

/// Where `initdb` and `postgres` are.
fn binaries() -> PathBuf {
    let complete = |dir: &PathBuf| dir.join("initdb").is_file() && dir.join("postgres").is_file();
    if let Some(dir) = std::env::var_os("WEIR_TEST_PG_BIN").map(PathBuf::from) {
        assert!(complete(&dir), "WEIR_TEST_PG_BIN={} holds no `initdb` and `postgres`", dir.display());
        return dir;
    }
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|entries| entries.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    // The greatest version first; `9.6` before `15` would be wrong, but those are long gone.
    found.sort();
    found.reverse();
    let path = std::env::var_os("PATH").unwrap_or_default();
    found.extend(std::env::split_paths(&path));
    found.into_iter().find(complete).unwrap_or_else(|| panic!("{HOW_TO}"))
}

/// Runs a closure on a thread that lives as long as the process: a child is sent its death signal when the *thread*
/// that started it ends, and the threads of tests end early.
fn on_lasting_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    type Job = Box<dyn FnOnce() + Send>;
    static THREAD: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        std::thread::spawn(move || inbox.into_iter().for_each(|job| job()));
        Mutex::new(jobs)
    });
    let (done, result) = mpsc::channel();
    let job: Job = Box::new(move || done.send(work()).unwrap());
    thread.lock().unwrap().send(job).unwrap();
    result.recv().unwrap()
}

fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new(program);
    // SAFETY: no arguments, no memory.
    if unsafe { libc::geteuid() } == 0 {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.current_dir("/").env("LC_ALL", "C");
    command
}

/// One running server. Stopped, and its data deleted, when dropped.
pub struct Server {
    bin: PathBuf,
    dir: tempfile::TempDir,
    child: Mutex<Option<Child>>,
}

impl Server {
    /// Makes a cluster and starts it.
    pub fn start() -> Self {
        let bin = binaries();
        let dir = tempfile::Builder::new().prefix("weir-pg-").tempdir().unwrap();
        let path = CString::new(dir.path().to_str().unwrap()).unwrap();
        // SAFETY: `path` is a valid C string for the time of the call.
        if unsafe { libc::geteuid() } == 0 {
            // SAFETY: as above.
            assert_eq!(unsafe { libc::chown(path.as_ptr(), NOBODY, NOBODY) }, 0, "chown");
        }
        let made = as_nobody(&bin.join("initdb"))
            .arg("-D")
            .arg(dir.path().join("data"))
            .args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"])
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let server = Self { bin, dir, child: Mutex::new(None) };
        server.resume();
        server
    }

    /// Starts the server again after [`Server::stop`], and waits until it answers.
    pub fn resume(&self) {
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        let mut command = as_nobody(&self.bin.join("postgres"));
        command.arg("-D").arg(self.dir.path().join("data")).arg("-k").arg(self.dir.path());
        for setting in
            ["listen_addresses=", "fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=200"]
        {
            command.arg("-c").arg(setting);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        // SAFETY: between fork and exec only `prctl` is called, which is a bare system call.
        unsafe {
            command.pre_exec(|| {
                // An immediate shutdown when the test process dies, by kill -9 too.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGQUIT) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        *self.child.lock().unwrap() = Some(on_lasting_thread(move || command.spawn().unwrap()));
        let socket = self.dir.path().join(".s.PGSQL.5432");
        let limit = Instant::now() + Duration::from_secs(60);
        let ready = self.dir.path().join("log");
        while !socket.exists() || !fs::read_to_string(&ready).unwrap_or_default().contains("ready to accept") {
            let ended = self.child.lock().unwrap().as_mut().and_then(|child| child.try_wait().unwrap());
            let said = || fs::read_to_string(&ready).unwrap_or_default();
            assert!(ended.is_none(), "postgres ended: {}", said());
            assert!(Instant::now() < limit, "postgres does not get ready: {}", said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the server at once, as a crash would; the data stays.
    pub fn stop(&self) {
        let Some(mut child) = self.child.lock().unwrap().take() else { return };
        // SAFETY: a signal to a child that has not been waited for, so the number is still its.
        unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGQUIT) };
        child.wait().unwrap();
    }

    fn url(&self, database: &str) -> String {
        format!("postgres:///{database}?host={}&user=postgres", self.dir.path().display())
    }

    /// A new, empty database; gives back its URL.
    pub async fn database(&self) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("weir_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let options: PgConnectOptions = self.url("postgres").parse().unwrap();
        let mut admin = options.connect().await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut admin).await.unwrap();
        admin.close().await.unwrap();
        self.url(&name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

static SHARED: Mutex<Option<&'static Server>> = Mutex::new(None);

extern "C" fn stop_shared() {
    if let Ok(mut shared) = SHARED.lock()
        && let Some(server) = shared.take()
    {
        server.stop();
        let _ = fs::remove_dir_all(server.dir.path());
    }
}

/// The server that all tests of this process share; started by whoever asks first.
pub fn shared() -> &'static Server {
    let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
    *shared.get_or_insert_with(|| {
        // SAFETY: `stop_shared` is a function that may be called at any time on any thread.
        unsafe { libc::atexit(stop_shared) };
        Box::leak(Box::new(Server::start()))
    })
}

/// A new, empty database on the shared server; gives back its URL.
pub async fn database() -> String {
    let server = tokio::task::spawn_blocking(shared).await.unwrap();
    server.database().await
}
