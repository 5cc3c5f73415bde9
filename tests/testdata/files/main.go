// Command files does with files what no applet of busybox does.
//
//	files map FILE TEXT    writes TEXT through a shared, writable mapping
//	files listen SOCKET    answers one connection with what it says
//	files dial SOCKET TEXT says TEXT and prints the answer
package main

import (
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "files:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("%d arguments, want a command and a file", len(args))
	}
	command, path := args[0], args[1]
	text := ""
	if len(args) > 2 {
		text = args[2]
	}
	switch command {
	case "map":
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, len(text), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("mmap: %w", err)
		}
		copy(m, text)
		if err := unix.Msync(m, unix.MS_SYNC); err != nil {
			return fmt.Errorf("msync: %w", err)
		}
		return unix.Munmap(m)
	case "listen":
		l, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		c, err := l.Accept()
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = io.Copy(c, c)
		return err
	case "dial":
		c, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		if _, err := io.WriteString(c, text); err != nil {
			return err
		}
		if err := c.(*net.UnixConn).CloseWrite(); err != nil {
			return err
		}
		_, err = io.Copy(os.Stdout, c)
		return err
	}
	return fmt.Errorf("no command is named %q", command)
}
