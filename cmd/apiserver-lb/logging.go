package main

import (
	"io"
	"log/slog"
	"os"

	"golang.org/x/term"

	"apiserver-lb/configs"
)

// newLog makes the program's log: text for a person at a terminal, JSON for a
// machine, unless the configuration says which.
func newLog(w io.Writer, c configs.Log) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // Load has refused what is no level
	}
	o := &slog.HandlerOptions{Level: level, ReplaceAttr: readableDuration}
	text := c.Format == configs.LogText
	if c.Format == configs.LogAuto {
		out := w
		if q, ok := w.(*logQueue); ok {
			out = q.w
		}
		f, ok := out.(*os.File)
		text = ok && term.IsTerminal(int(f.Fd()))
	}
	if q, ok := w.(*logQueue); ok {
		q.text = text
	}
	if text {
		return slog.New(slog.NewTextHandler(w, o))
	}
	return slog.New(slog.NewJSONHandler(w, o))
}

// readableDuration writes durations as "30s" in JSON too, where slog has
// nanoseconds.
func readableDuration(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}
