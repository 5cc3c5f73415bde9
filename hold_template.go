package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/template"
)

// holdCommand is the hidden command that keeps a template's memory.
const holdCommand = "hold-template"

// Descriptors that a holder inherits: the template's socket and directory.
const (
	holdListenerFD = 3
	holdDirFD      = 4
)

// holdTemplateMain is the holder of one template, as 'manage create-template'
// starts it. It does not return.
func holdTemplateMain(args []string) {
	if len(args) != 1 {
		_, _ = fmt.Fprintln(os.Stderr, "runv hold-template is started by runv itself")
		os.Exit(1)
	}
	setupGlog(false)
	// It has next to nothing of its own, and lives long.
	debug.SetGCPercent(20)
	unix.CloseOnExec(holdListenerFD)
	unix.CloseOnExec(holdDirFD)
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	err := template.Hold(ctx, os.NewFile(holdDirFD, args[0]), os.NewFile(holdListenerFD, "listener"))
	stop()
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, oneLine(err.Error()))
	}
	glog.Flush()
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}
