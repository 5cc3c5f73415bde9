package main

import (
	"context"
	"fmt"
	"os"

	"github.com/hyperhq/runv/trace"
)

// tracing is the trace of a command; nil without one.
type tracing struct {
	file     *os.File
	recorder *trace.Recorder
}

// openTrace begins the trace of the command of that name. The file is opened
// before anything is done: a command that could not be traced does nothing.
func openTrace(ctx context.Context, path, command string, start trace.Mark) (context.Context, *tracing, error) {
	if path == "" {
		return ctx, nil, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return ctx, nil, fmt.Errorf("--trace: %w", err)
	}
	r := trace.New("runv")
	started := start.Started()
	r.Record("start of the process", started, start.At.Sub(started))
	// It ends with the trace.
	r.Begin(command)
	return trace.With(ctx, r), &tracing{f, r}, nil
}

// close writes the trace.
func (t *tracing) close() error {
	if t == nil {
		return nil
	}
	err := trace.Write(t.file, t.recorder.Spans())
	if cerr := t.file.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("--trace: %w", err)
	}
	return nil
}
