//! A service's numbers as Prometheus and OpenMetrics have them: the answer to `GET /metrics`.
//!
//! Names follow Prometheus' conventions: base units, `_total` for what only grows. What goes by an export has its volume, its
//! frontend and its name as labels.

#![forbid(unsafe_code)]

mod text;

use super::stats::{ExportStats, OperationStats, Stats, VolumeStats};
use super::status::{ExportStatus, Status};
use text::Labels;
pub use text::{Format, Text};

/// Everything, in one text.
pub fn render(status: &Status, stats: &Stats, format: Format) -> String {
    let mut text = Text::new(format);
    text.gauge("ringblk_build_info", "Version of the program; always 1.");
    text.sample(&[("version", &status.version)], 1);
    text.gauge("ringblk_uptime_seconds", "Time since the service began.");
    text.sample(&[], seconds(stats.uptime_ns));
    volumes(&mut text, status, &stats.volumes);
    clients(&mut text, status);
    exports(&mut text, &stats.exports);
    text.counter("ringblk_worker_seconds", "What the workers spent their time on.");
    for (number, worker) in stats.workers.iter().enumerate() {
        let number = number.to_string();
        for (state, time) in
            [("busy", worker.busy_ns), ("polling", worker.polling_ns), ("asleep", worker.asleep_ns)]
        {
            text.sample(&[("worker", &number), ("state", state)], seconds(time));
        }
    }
    text.finish()
}

fn volumes(text: &mut Text, status: &Status, stats: &[VolumeStats]) {
    let volumes = &status.volumes;
    text.gauge("ringblk_volume_size_bytes", "Capacity.");
    for volume in volumes {
        text.sample(&[("volume", &volume.name), ("driver", &volume.driver)], volume.size_bytes);
    }
    text.gauge("ringblk_volume_available", "1 for a volume that is there, with all its exports.");
    for volume in volumes {
        text.sample(&[("volume", &volume.name)], u8::from(volume.unavailable.is_none()));
    }
    text.gauge(
        "ringblk_volume_paused",
        "1 for a volume whose store failed and whose requests wait for a resume.",
    );
    for volume in volumes {
        text.sample(&[("volume", &volume.name)], u8::from(volume.paused));
    }
    text.gauge("ringblk_volume_waiting_requests", "Requests that wait for a resume, or to be tried again.");
    for volume in volumes {
        text.sample(&[("volume", &volume.name)], volume.waiting);
    }
    text.counter(
        "ringblk_volume_throttled_seconds",
        "How long the volume's queues have waited for its limits.",
    );
    for volume in stats {
        text.sample(&[("volume", &volume.name)], seconds(volume.throttled_ns));
    }
    text.counter("ringblk_volume_losses", "How often the store told that acknowledged writes are lost.");
    for volume in stats {
        text.sample(&[("volume", &volume.name)], volume.losses);
    }
    text.counter("ringblk_volume_resizes", "Changes of its size.");
    for volume in stats {
        text.sample(&[("volume", &volume.name)], volume.resizes);
    }
}

fn clients(text: &mut Text, status: &Status) {
    text.gauge("ringblk_export_connected", "1 for a vhost-user export with a VMM.");
    for export in &status.exports {
        if let ExportStatus::VhostUser(vhost_user) = export {
            let socket = vhost_user.socket.to_string_lossy();
            let labels = [("volume", &*vhost_user.volume), ("frontend", "vhost-user"), ("export", &socket)];
            text.sample(&labels, u8::from(vhost_user.connected));
        }
    }
}

fn exports(text: &mut Text, exports: &[ExportStats]) {
    text.gauge("ringblk_export_in_flight_requests", "Requests under way.");
    for export in exports {
        text.sample(&labels(export), export.in_flight);
    }
    text.counter("ringblk_export_bytes", "Bytes of requests that succeeded.");
    each(text, exports, |text, labels, op| text.sample(labels, op.bytes));
    text.counter("ringblk_export_failed_requests", "Requests that failed.");
    each(text, exports, |text, labels, op| text.sample(labels, op.errors));
    text.counter("ringblk_export_errors", "Requests that failed, by their error.");
    for export in exports {
        for (errno, count) in &export.errors {
            let labels = [&labels(export)[..], &[("errno", errno)]].concat();
            text.sample(&labels, count);
        }
    }
    text.histogram("ringblk_export_request_duration_seconds", "How long requests took.");
    each(text, exports, |text, labels, op| {
        let buckets = op.times.octaves().map(|(end, count)| (seconds(end), count));
        text.buckets(labels, buckets, op.requests, seconds(op.times.nanoseconds()));
    });
}

/// Has `write` write a sample for each operation of each export.
fn each(text: &mut Text, exports: &[ExportStats], write: impl Fn(&mut Text, &Labels<'_>, &OperationStats)) {
    for export in exports {
        for (op, stats) in &export.operations {
            write(text, &[&labels(export)[..], &[("operation", op)]].concat(), stats);
        }
    }
}

fn labels(export: &ExportStats) -> [(&'static str, &str); 3] {
    let name = export.name.split_once(':').map_or(&*export.name, |(_, name)| name);
    [("volume", &export.volume), ("frontend", &export.frontend), ("export", name)]
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Errno, Op};
    use crate::service::status::sample;
    use crate::stats;

    fn stats() -> Stats {
        let counted = stats::ExportStats::new(2);
        for (queue, micros) in [(0, 3), (1, 70), (1, 3)] {
            counted.queue(queue).begin();
            counted.queue(queue).end(Op::Read, 4096, micros * 1000, Ok(()));
        }
        counted.queue(0).begin();
        counted.queue(0).end(Op::Write, 4096, 1, Err(Errno::EIO));
        counted.queue(0).begin();
        let exports =
            sample().exports.iter().map(|status| ExportStats::new(status, counted.read())).collect();
        let volume = VolumeStats { name: "root".into(), throttled_ns: 2_500_000_000, losses: 2, resizes: 3 };
        Stats { uptime_ns: 1_500_000_000, exports, volumes: vec![volume], workers: vec![Default::default()] }
    }

    #[test]
    fn both_formats_say_the_same() {
        let (status, stats) = (sample(), stats());
        let plain = render(&status, &stats, Format::Prometheus);
        let open = render(&status, &stats, Format::OpenMetrics);
        let samples = |text: &str| {
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(samples(&plain), samples(&open));
        assert!(open.ends_with("# EOF\n") && !plain.contains("# EOF"));
        assert!(plain.contains("# TYPE ringblk_export_bytes_total counter\n"), "{plain}");
        assert!(open.contains("# TYPE ringblk_export_bytes counter\n"), "{open}");
    }

    #[test]
    fn a_histogram_grows_to_its_count() {
        let text = render(&sample(), &stats(), Format::Prometheus);
        let of = |suffix: &str, more: &str| {
            let start = format!("ringblk_export_request_duration_seconds_{suffix}{{");
            let lines = text.lines().filter(|line| line.starts_with(&start) && line.contains("\"read\""));
            lines.filter(|line| line.contains(more)).map(|line| line.rsplit_once(' ').unwrap().1).next()
        };
        assert_eq!(of("bucket", "le=\"0.000002048\""), Some("0"), "{text}");
        assert_eq!(of("bucket", "le=\"0.000004096\""), Some("2"));
        assert_eq!(of("bucket", "le=\"+Inf\""), Some("3"));
        assert_eq!((of("count", ""), of("sum", "")), (Some("3"), Some("0.000076")));
    }

    #[test]
    fn volumes_tell_what_became_of_them() {
        let text = render(&sample(), &stats(), Format::Prometheus);
        for line in [
            "throttled_seconds_total{volume=\"root\"} 2.5",
            "losses_total{volume=\"root\"} 2",
            "resizes_total{volume=\"root\"} 3",
        ] {
            assert!(text.contains(&format!("\nringblk_volume_{line}\n")), "{line}: {text}");
        }
    }

    #[test]
    fn failures_go_by_their_error() {
        let text = render(&sample(), &stats(), Format::Prometheus);
        let failed = text.lines().filter(|line| line.starts_with("ringblk_export_errors_total{"));
        assert!(
            failed.clone().count() > 0 && failed.clone().all(|line| line.ends_with("errno=\"EIO\"} 1")),
            "{text}"
        );
        let in_flight = text.lines().filter(|line| line.starts_with("ringblk_export_in_flight_requests{"));
        assert!(in_flight.clone().count() > 0 && in_flight.clone().all(|line| line.ends_with(" 1")));
    }
}
