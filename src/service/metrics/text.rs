//! The text formats of Prometheus (0.0.4) and OpenMetrics (1.0.0), as far as a service needs them. They differ in the names of
//! counters, and in how they end.

#![forbid(unsafe_code)]

use std::fmt::{Display, Write};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// What every scraper reads.
    Prometheus,
    /// What those ask for that know it.
    OpenMetrics,
}

impl Format {
    /// What a client wants that accepts such media types: the first that is one of ours.
    pub fn accepted(accept: &str) -> Format {
        let types = accept.split(',').map(|part| part.split(';').next().unwrap_or_default().trim());
        let wanted =
            types.filter(|name| ["application/openmetrics-text", "text/plain", "*/*"].contains(name));
        match wanted.take(1).next() {
            Some("application/openmetrics-text") => Format::OpenMetrics,
            _ => Format::Prometheus,
        }
    }

    /// The media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Names and values.
pub type Labels<'a> = [(&'a str, &'a str)];

/// A text that is being written: a family, its samples, the next family.
pub struct Text {
    text: String,
    format: Format,
    /// What the samples that follow are called.
    name: String,
}

impl Text {
    /// Without anything.
    pub fn new(format: Format) -> Text {
        Text { text: String::new(), format, name: String::new() }
    }

    /// Begins what may go up and down.
    pub fn gauge(&mut self, name: &str, help: &str) {
        self.family(name, name, "gauge", help);
    }

    /// Begins what only grows. `name`: without `_total`.
    pub fn counter(&mut self, name: &str, help: &str) {
        let sample = format!("{name}_total");
        let family = if self.format == Format::OpenMetrics { name } else { &*sample };
        self.family(family, &sample, "counter", help);
    }

    /// Begins a family of [buckets](Self::buckets).
    pub fn histogram(&mut self, name: &str, help: &str) {
        self.family(name, name, "histogram", help);
    }

    fn family(&mut self, name: &str, sample: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
        let unit = name.rsplit('_').next().filter(|unit| ["seconds", "bytes"].contains(unit));
        if let (Format::OpenMetrics, Some(unit)) = (self.format, unit) {
            self.line(format_args!("# UNIT {name} {unit}"));
        }
        sample.clone_into(&mut self.name);
    }

    /// A sample of the family.
    pub fn sample(&mut self, labels: &Labels<'_>, value: impl Display) {
        self.named("", labels, value);
    }

    /// A histogram: how many are not longer than each of some ends, how many there are, and all of them together.
    pub fn buckets(
        &mut self,
        labels: &Labels<'_>,
        ends: impl Iterator<Item = (f64, u64)>,
        count: u64,
        sum: f64,
    ) {
        for (end, below) in ends {
            // A longer bucket may have been counted after this one was read.
            self.named("_bucket", &[labels, &[("le", &end.to_string())]].concat(), below.min(count));
        }
        self.named("_bucket", &[labels, &[("le", "+Inf")]].concat(), count);
        self.named("_sum", labels, sum);
        self.named("_count", labels, count);
    }

    fn named(&mut self, suffix: &str, labels: &Labels<'_>, value: impl Display) {
        let mut list = String::new();
        for (name, value) in labels {
            if !list.is_empty() {
                list.push(',');
            }
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(list, "{name}=\"{value}\"");
        }
        let name = std::mem::take(&mut self.name);
        match list.is_empty() {
            true => self.line(format_args!("{name}{suffix} {value}")),
            false => self.line(format_args!("{name}{suffix}{{{list}}} {value}")),
        }
        self.name = name;
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Text takes whatever comes.
        let _ = writeln!(self.text, "{line}");
    }

    /// All of it.
    pub fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.line(format_args!("# EOF"));
        }
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_format_that_is_known_is_taken() {
        for (accept, format) in [
            ("", Format::Prometheus),
            ("text/html, */*", Format::Prometheus),
            ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", Format::OpenMetrics),
            ("text/plain,application/openmetrics-text", Format::Prometheus),
            (";;,,application/openmetrics-text", Format::OpenMetrics),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept}");
        }
    }

    #[test]
    fn only_openmetrics_tells_the_unit() {
        for (format, units) in [(Format::Prometheus, 0), (Format::OpenMetrics, 2)] {
            let mut text = Text::new(format);
            text.counter("a_bytes", "Help.");
            text.gauge("b_seconds", "Help.");
            text.gauge("c_requests", "Help.");
            assert_eq!(text.finish().matches("# UNIT ").count(), units);
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut text = Text::new(Format::Prometheus);
        text.gauge("g", "Help.");
        text.sample(&[("a", "b\"c\\d\ne"), ("f", "")], 1.5);
        assert_eq!(text.finish(), "# HELP g Help.\n# TYPE g gauge\ng{a=\"b\\\"c\\\\d\\ne\",f=\"\"} 1.5\n");
    }
}
