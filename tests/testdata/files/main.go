// Command files does with files what no applet of busybox does.
//
//	files map FILE TEXT     writes TEXT through a shared, writable mapping
//	files mapped FILE TEXT  waits for TEXT in a mapping of its own
//	files listen SOCKET     answers one connection with what it says
//	files dial SOCKET TEXT  says TEXT and prints the answer
//	files hold FILE KIND    locks it with flock or fcntl, says so, and waits for the end of its input
//	files locked FILE KIND  says so if another process has
//	files watch DIR         says that it watches, and then the name of what is made there
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

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
	case "map", "mapped":
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, len(text), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("mmap: %w", err)
		}
		if command == "mapped" {
			return wait(m, text)
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
	case "hold", "locked":
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		switch text {
		case "flock":
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		case "fcntl":
			err = unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		default:
			return fmt.Errorf("%q is no kind of lock", text)
		}
		if command == "locked" && errors.Is(err, unix.EAGAIN) {
			fmt.Println("locked")
			return nil
		}
		if err != nil || command == "locked" {
			return err
		}
		fmt.Println("held")
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	case "watch":
		return watch(path)
	}
	return fmt.Errorf("no command is named %q", command)
}

// wait returns when a mapping begins with text.
func wait(m []byte, text string) error {
	fmt.Println("mapped")
	for range 600 {
		if string(m[:len(text)]) == text {
			fmt.Println("seen")
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("the mapping has %q", m[:len(text)])
}

func watch(dir string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE); err != nil {
		return err
	}
	fmt.Println("watching")
	b := make([]byte, unix.SizeofInotifyEvent+unix.NAME_MAX+1)
	n, err := unix.Read(fd, b)
	if err != nil {
		return err
	}
	name, _, _ := strings.Cut(string(b[unix.SizeofInotifyEvent:n]), "\x00")
	fmt.Println(name)
	return nil
}
