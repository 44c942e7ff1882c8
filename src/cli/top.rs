//! `ringblk top`.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::Failure;
use super::output::{print, table};
use super::stats::duration;
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;
use crate::service::stats::{ExportStats, OperationStats, Stats, WorkerTime};
use clap::ValueEnum;
use console::{Key, Term};
use serde::Serialize;

/// Show what the exports of a running service do, again and again.
///
/// Keys: i, b, l, n sort by operations, bytes, latency, name; space pauses; q or Escape ends.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk top --sort latency
  ringblk top --batch --count 10 --interval 5 >log
  ringblk top --json --count 1 | jq '.exports[].read_iops'")]
pub(super) struct Args {
    /// Only exports in whose name this is found
    #[arg(value_name = "TEXT", default_value = "")]
    filter: String,
    /// Seconds from one look to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = interval)]
    interval: f64,
    /// What stands first
    #[arg(long, value_enum, default_value_t = Sort::Iops)]
    sort: Sort,
    /// End after so many looks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Print one look after the other, as for a file
    #[arg(long)]
    batch: bool,
    /// Print each look as a line of JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sort {
    /// Operations in a second, the most first
    Iops,
    /// Bytes in a second, the most first
    Bytes,
    /// 99 % of the requests took no longer, the longest first
    Latency,
    /// The name
    Name,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "must be from 0.1 to 3600 seconds".to_owned())
}

/// What happened from one look to the next.
#[derive(Debug, PartialEq, Serialize)]
struct Look {
    seconds: f64,
    exports: Vec<Row>,
    workers: Vec<Shares>,
}

/// Of one export.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    name: String,
    volume: String,
    read_iops: f64,
    write_iops: f64,
    /// Flushes, discards and write-zeroes.
    other_iops: f64,
    read_bytes_per_second: f64,
    write_bytes_per_second: f64,
    errors_per_second: f64,
    in_flight: u64,
    requests: u64,
    p50_ns: Option<u64>,
    p99_ns: Option<u64>,
    p999_ns: Option<u64>,
}

/// Of a worker's time, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Shares {
    busy: f64,
    polling: f64,
}

impl Row {
    fn iops(&self) -> f64 {
        self.read_iops + self.write_iops + self.other_iops
    }

    fn bytes(&self) -> f64 {
        self.read_bytes_per_second + self.write_bytes_per_second
    }

    fn new(now: &ExportStats, before: Option<&ExportStats>, seconds: f64) -> Row {
        let since = |op: &str| {
            let none = OperationStats::default();
            let of = |stats: Option<&ExportStats>| stats.and_then(|stats| stats.operations.get(op).cloned());
            of(Some(now)).unwrap_or_default().since(&of(before).unwrap_or(none))
        };
        let (read, write) = (since("read"), since("write"));
        let mut all = read.times.clone();
        all.add(&write.times);
        let mut errors = read.errors + write.errors;
        let mut others = 0;
        for op in ["flush", "discard", "write-zeroes"] {
            let stats = since(op);
            all.add(&stats.times);
            errors += stats.errors;
            others += stats.requests;
        }
        let rate = |count: u64| count as f64 / seconds;
        let [p50_ns, p99_ns, p999_ns] = [0.5, 0.99, 0.999].map(|share| all.quantile(share));
        Row {
            name: now.name.clone(),
            volume: now.volume.clone(),
            read_iops: rate(read.requests),
            write_iops: rate(write.requests),
            other_iops: rate(others),
            read_bytes_per_second: rate(read.bytes),
            write_bytes_per_second: rate(write.bytes),
            errors_per_second: rate(errors),
            in_flight: now.in_flight,
            requests: all.count(),
            p50_ns,
            p99_ns,
            p999_ns,
        }
    }
}

impl Look {
    /// From `before` to `now`; from the beginning where that is another service's.
    fn between(before: &Stats, now: &Stats, filter: &str) -> Look {
        let same = now.uptime_ns > before.uptime_ns;
        let nothing = Stats::default();
        let before = if same { before } else { &nothing };
        let seconds = (now.uptime_ns - before.uptime_ns).max(1) as f64 / 1e9;
        let exports = now.exports.iter().filter(|export| export.name.contains(filter)).map(|export| {
            let earlier = before.exports.iter().find(|earlier| earlier.name == export.name);
            Row::new(export, earlier, seconds)
        });
        let idle = WorkerTime::default();
        let workers = now.workers.iter().enumerate().map(|(at, worker)| {
            let earlier = before.workers.get(at).unwrap_or(&idle);
            let share = |now: u64, before: u64| now.saturating_sub(before) as f64 / 1e9 / seconds;
            Shares {
                busy: share(worker.busy_ns, earlier.busy_ns),
                polling: share(worker.polling_ns, earlier.polling_ns),
            }
        });
        Look { seconds, exports: exports.collect(), workers: workers.collect() }
    }

    fn sort(&mut self, by: Sort) {
        self.exports.sort_by(|one, other| {
            let most = |of: fn(&Row) -> f64| of(other).total_cmp(&of(one));
            let first = match by {
                Sort::Iops => most(Row::iops),
                Sort::Bytes => most(Row::bytes),
                Sort::Latency => other.p99_ns.cmp(&one.p99_ns),
                Sort::Name => std::cmp::Ordering::Equal,
            };
            first.then_with(|| one.name.cmp(&other.name))
        });
    }

    fn render(&self) -> String {
        let workers = self.workers.iter().enumerate().map(|(number, shares)| {
            let polling = if shares.polling >= 0.005 {
                format!(" (looking {:.0}%)", shares.polling * 100.0)
            } else {
                String::new()
            };
            format!("{number}: {:.0}%{polling}", shares.busy * 100.0)
        });
        let iops: f64 = self.exports.iter().map(Row::iops).sum();
        let bytes: f64 = self.exports.iter().map(Row::bytes).sum();
        let mut text = format!(
            "{} exports, {} operations/s, {}B/s; workers busy: {}\n\n",
            self.exports.len(),
            short(iops),
            short(bytes),
            workers.collect::<Vec<_>>().join(", ")
        );
        let head = [
            "VOLUME", "R/s", "W/s", "OTHER/s", "R B/s", "W B/s", "P50", "P99", "P99.9", "DEPTH", "ERR/s",
            "EXPORT",
        ];
        let mut rows = vec![head.map(String::from)];
        for row in &self.exports {
            let took = |time| duration(time, row.requests);
            rows.push([
                row.volume.clone(),
                short(row.read_iops),
                short(row.write_iops),
                short(row.other_iops),
                short(row.read_bytes_per_second),
                short(row.write_bytes_per_second),
                took(row.p50_ns),
                took(row.p99_ns),
                took(row.p999_ns),
                row.in_flight.to_string(),
                short(row.errors_per_second),
                row.name.clone(),
            ]);
        }
        text += &table(&rows);
        text
    }
}

/// A number in three digits: 0, 12.3k, 4.56M.
fn short(value: f64) -> String {
    let mut value = value;
    for unit in ["", "k", "M", "G", "T"] {
        if value < 999.5 {
            return match value {
                value if value == 0.0 || value >= 99.95 => format!("{value:.0}{unit}"),
                value if value >= 9.995 => format!("{value:.1}{unit}"),
                value => format!("{value:.2}{unit}"),
            };
        }
        value /= 1000.0;
    }
    format!("{value:.0}P")
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    let mut before = client.stats().map_err(Failure::failed)?;
    let term = Term::stdout();
    if args.batch || args.json || !term.is_term() {
        let mut looks = 0;
        while args.count.is_none_or(|count| looks < count) {
            thread::sleep(Duration::from_secs_f64(args.interval));
            let now = client.stats().map_err(Failure::failed)?;
            let mut look = Look::between(&before, &now, &args.filter);
            look.sort(args.sort);
            match args.json {
                true => print(&(serde_json::to_string(&look).map_err(Failure::failed)? + "\n"))?,
                false => print(&(look.render() + "\n"))?,
            }
            (before, looks) = (now, looks + 1);
        }
        return Ok(());
    }
    let shown = Screen::new(term).and_then(|screen| screen.show(args, &client, before));
    shown.map_err(|error| Failure::failed(format!("the terminal: {error}")))?
}

/// The terminal, as it was again when this is dropped.
struct Screen {
    term: Term,
    keys: Receiver<Key>,
}

impl Screen {
    fn new(term: Term) -> io::Result<Screen> {
        let (press, keys) = channel();
        let input = term.clone();
        // It ends with the process: a read of the terminal cannot be called off.
        thread::Builder::new().name("ringblk-keys".into()).spawn(move || {
            while let Ok(key) = input.read_key() {
                if press.send(key).is_err() {
                    return;
                }
            }
        })?;
        term.hide_cursor()?;
        term.clear_screen()?;
        Ok(Screen { term, keys })
    }

    /// Shows looks until there is enough of them. The outer error is the terminal's.
    fn show(self, args: &Args, client: &Client, mut before: Stats) -> io::Result<Result<(), Failure>> {
        let (mut sort, mut paused, mut looks) = (args.sort, false, 0);
        let mut look = Look::between(&before, &before, &args.filter);
        let every = Duration::from_secs_f64(args.interval);
        let mut next = Instant::now() + every;
        loop {
            look.sort(sort);
            self.draw(&look, sort, paused)?;
            match self.keys.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Key::Char('q') | Key::Escape | Key::CtrlC) => return Ok(Ok(())),
                Ok(Key::Char('i')) => sort = Sort::Iops,
                Ok(Key::Char('b')) => sort = Sort::Bytes,
                Ok(Key::Char('l')) => sort = Sort::Latency,
                Ok(Key::Char('n')) => sort = Sort::Name,
                Ok(Key::Char(' ')) => paused = !paused,
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(Ok(())),
                Err(RecvTimeoutError::Timeout) => {
                    next = Instant::now() + every;
                    if paused {
                        continue;
                    }
                    let now = match client.stats() {
                        Ok(now) => now,
                        Err(error) => return Ok(Err(Failure::failed(error))),
                    };
                    look = Look::between(&before, &now, &args.filter);
                    (before, looks) = (now, looks + 1);
                    if args.count.is_some_and(|count| looks >= count) {
                        look.sort(sort);
                        self.draw(&look, sort, paused)?;
                        return Ok(Ok(()));
                    }
                }
            }
        }
    }

    fn draw(&self, look: &Look, sort: Sort, paused: bool) -> io::Result<()> {
        let (height, width) = self.term.size();
        let by = sort.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        let keys =
            format!("by {by}; i b l n sort, space {}, q ends", if paused { "goes on" } else { "pauses" });
        let text = look.render();
        let lines = text.lines().take(usize::from(height).saturating_sub(2)).chain([keys.as_str()]);
        // Only what is new is written: nothing flickers.
        self.term.move_cursor_to(0, 0)?;
        for line in lines {
            self.term.clear_line()?;
            self.term.write_line(&line.chars().take(width.into()).collect::<String>())?;
        }
        self.term.clear_to_end_of_screen()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = self.term.show_cursor();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Op;
    use crate::cli::parsed;
    use crate::service::status::sample;
    use crate::stats;

    fn stats(uptime_ns: u64, counted: &[stats::ExportStats]) -> Stats {
        let exports = sample().exports.into_iter().zip(counted);
        let exports = exports.map(|(status, counted)| ExportStats::new(&status, counted.read())).collect();
        let busy_ns = uptime_ns / 2;
        let workers = vec![WorkerTime { busy_ns, polling_ns: 0, asleep_ns: busy_ns }];
        Stats { uptime_ns, exports, workers, ..Stats::default() }
    }

    fn work(export: &stats::ExportStats, op: Op, times: u64, nanoseconds: u64) {
        for _ in 0..times {
            export.queue(0).begin();
            export.queue(0).end(op, 4096, nanoseconds, Ok(()));
        }
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let counted = [stats::ExportStats::new(1), stats::ExportStats::new(1)];
        work(&counted[0], Op::Read, 1000, 1_000_000_000);
        let before = stats(1_000_000_000, &counted);
        work(&counted[0], Op::Read, 200, 5_000);
        work(&counted[1], Op::Write, 400, 3_000);
        work(&counted[1], Op::Flush, 2, 3_000);
        let now = stats(3_000_000_000, &counted);
        let mut look = Look::between(&before, &now, "");
        look.sort(Sort::Iops);
        let [first, second] = &look.exports[..] else { panic!("{look:?}") };
        assert_eq!((first.write_iops, first.other_iops, first.read_iops), (200.0, 1.0, 0.0));
        assert_eq!((second.read_iops, second.read_bytes_per_second), (100.0, 409_600.0));
        assert_eq!(second.p99_ns, Some(5120), "what was before does not count");
        assert_eq!(look.workers[0].busy, 0.5);
        look.sort(Sort::Latency);
        assert!(look.exports[0].read_iops > 0.0);
        look.sort(Sort::Name);
        assert!(look.exports[0].name < look.exports[1].name);
        assert_eq!(Look::between(&before, &now, "vhost").exports.len(), 1);
        // Another service has the socket by now: its numbers are all new.
        let look = Look::between(&now, &before, "ublk");
        assert_eq!((look.seconds, look.exports[0].read_iops), (1.0, 1000.0));
    }

    #[test]
    fn a_look_is_a_table() {
        let counted = [stats::ExportStats::new(1)];
        let before = stats(1_000_000_000, &counted);
        work(&counted[0], Op::Read, 2000, 70_000);
        let text = Look::between(&before, &stats(2_000_000_000, &counted), "").render();
        let expected = "\
1 exports, 2.00k operations/s, 8.19MB/s; workers busy: 0: 50%

VOLUME  R/s    W/s  OTHER/s  R B/s  W B/s  P50      P99      P99.9    DEPTH  ERR/s  EXPORT
root    2.00k  0    0        8.19M  0      81.9 us  81.9 us  81.9 us  0      0      ublk:root
";
        assert_eq!(text, expected);
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in
            [(0.0, "0"), (0.4, "0.40"), (12.34, "12.3"), (999.4, "999"), (999.6, "1.00k"), (1e17, "100P")]
        {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn arguments_have_their_ranges() {
        let args: Args = parsed("top root --sort latency --interval 0.5 --count 3").unwrap();
        assert_eq!(
            (args.sort, args.interval, args.count, &*args.filter),
            (Sort::Latency, 0.5, Some(3), "root")
        );
        for wrong in ["--interval 0", "--interval x", "--count 0", "--sort depth"] {
            assert!(parsed::<Args>(&format!("top {wrong}")).is_err(), "{wrong}");
        }
    }
}
