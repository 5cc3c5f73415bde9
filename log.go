package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/golang/glog"
)

// logger writes what container managers read: runc's log file, one line per
// message as JSON or as logfmt. Errors are also one line on standard error.
type logger struct {
	stderr io.Writer
	file   *os.File
	json   bool
	debug  bool
}

func newLogger() *logger { return &logger{stderr: os.Stderr} }

// open sets where and how to write. Without a path, or with standard error's
// own, there is no file.
func (l *logger) open(path, format string, debug bool) error {
	l.json = format == "json"
	l.debug = debug
	toFile := path != "" && path != "/dev/stderr"
	setupGlog(debug && !toFile)
	if !toFile {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND|os.O_SYNC, 0o644)
	if err != nil {
		return fmt.Errorf("open log file: %w", err)
	}
	l.file = f
	return nil
}

func (l *logger) close() {
	glog.Flush()
	if l.file != nil {
		_ = l.file.Close()
	}
}

// setupGlog makes glog write to standard error only: it never makes files of
// its own in a temporary directory.
func setupGlog(debug bool) {
	_ = flag.Set("logtostderr", "true")
	v := "0"
	if debug {
		v = "4"
	}
	_ = flag.Set("v", v)
}

// fatal reports the error that ends the program.
func (l *logger) fatal(line string) {
	l.toFile("error", line)
	if l.file == nil && l.json {
		_, _ = l.stderr.Write(format(l.json, "error", line, time.Now()))
		return
	}
	_, _ = fmt.Fprintln(l.stderr, line)
}

// warning goes to the log file alone: standard error belongs to the container.
func (l *logger) warning(line string) {
	l.toFile("warning", line)
	if l.debug && l.file == nil {
		glog.Warning(line)
	}
}

// debugf is for the developer. With a log file, standard error is the container's.
func (l *logger) debugf(text string, a ...any) {
	if !l.debug {
		return
	}
	line := oneLine(fmt.Sprintf(text, a...))
	l.toFile("debug", line)
	if l.file == nil {
		glog.V(1).Info(line)
	}
}

func (l *logger) toFile(level, line string) {
	if l.file != nil {
		_, _ = l.file.Write(format(l.json, level, line, time.Now()))
	}
}

// format is one message as logrus, and so runc, writes it.
func format(asJSON bool, level, msg string, now time.Time) []byte {
	at := now.UTC().Format(time.RFC3339)
	if asJSON {
		b, err := json.Marshal(struct {
			Level string `json:"level"`
			Msg   string `json:"msg"`
			Time  string `json:"time"`
		}{level, msg, at})
		if err == nil {
			return append(b, '\n')
		}
	}
	if needsQuotes(msg) {
		msg = strconv.Quote(msg)
	}
	return []byte("time=\"" + at + "\" level=" + level + " msg=" + msg + "\n")
}

// needsQuotes is logrus's rule.
func needsQuotes(s string) bool {
	return s == "" || strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._/@^+", r))
	})
}
