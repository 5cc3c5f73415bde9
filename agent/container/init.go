package container

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// InitArg is the argument with which the agent's program becomes the builder of
// a container in a user namespace; its main function then calls RunInit.
const InitArg = "container-init"

// selfExe is this program, also when its file was replaced.
const selfExe = "/proc/self/exe"

// Messages between the agent and the builder go over a stream socket, the
// builder's descriptor 0. Each is a length, a JSON document of that length, and
// as many descriptors as the document says.
const (
	maxMessage  = 64 << 20
	fdsPerWrite = 64 // the kernel's limit is 253
)

// buildRequest begins the conversation.
type buildRequest struct {
	Request []byte   // agentv1.CreateContainerRequest
	Share   string   // Env.ShareDir
	Files   []string // what the descriptors are; see inputs.pack
}

// buildReply answers buildRequest.
type buildReply struct {
	Error *remoteError
	Pid   int
	Files []string // "console", "root"
}

// startReply answers the start message, which is an empty document.
type startReply struct{ Error *remoteError }

// remoteError carries an error and its errno.
type remoteError struct {
	Text  string
	Errno uint
	Died  bool
}

func (e *remoteError) Error() string { return e.Text }

func (e *remoteError) Is(target error) bool {
	if e.Died && target == spawn.ErrDied {
		return true
	}
	return e.Errno != 0 && target == unix.Errno(e.Errno)
}

func toRemote(err error) *remoteError {
	if err == nil {
		return nil
	}
	e := &remoteError{Text: err.Error(), Died: errors.Is(err, spawn.ErrDied)}
	var errno unix.Errno
	if errors.As(err, &errno) {
		e.Errno = uint(errno)
	}
	return e
}

// asError avoids the typed nil.
func (e *remoteError) asError() error {
	if e == nil {
		return nil
	}
	return e
}

// userBuild is a container that a second process has built.
type userBuild struct {
	builder *spawn.Child
	output  *os.File // what the builder says when it breaks
	conn    *os.File
	child   *spawn.Child
	console *os.File
	rootFD  *os.File
}

// buildInUser builds the container in its user namespace, by a second process.
// That is in the container's cgroup until init exists, which could not be born
// there otherwise: the namespace's root may not move processes.
func (c *Container) buildInUser(ctx context.Context, in *inputs) (_ *userBuild, err error) {
	defer in.closeSources()
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	u := &userBuild{conn: ours}
	if u.output, err = memFile("builder output", nil); err != nil {
		_, _ = ours.Close(), theirs.Close()
		return nil, err
	}
	defer func() {
		_ = theirs.Close()
		if err != nil {
			u.close()
		}
	}()
	spec := &spawn.Spec{
		Path: c.env.Init, Args: []string{"runv-agent", InitArg}, Env: []string{"GOMAXPROCS=1"},
		Files: [3]*os.File{theirs, u.output, u.output}, CgroupFD: in.cgroup, Proc: in.proc,
	}
	if user := in.joins[agentv1.Namespace_TYPE_USER]; user != nil {
		spec.Setns, spec.JoinsUser = []*os.File{user}, true
	} else {
		spec.CloneFlags = unix.CLONE_NEWUSER
		spec.UIDMap, spec.GIDMap = spawnMap(c.req.GetUidMappings()), spawnMap(c.req.GetGidMappings())
	}
	if u.builder, err = spawn.Start(spec); err != nil {
		return nil, processError(err, c.req.GetProcess())
	}
	if err := u.builder.ExecError(); err != nil {
		return nil, fmt.Errorf("execute %s %s: %w", c.env.Init, InitArg, err)
	}
	_ = theirs.Close()
	stop := context.AfterFunc(ctx, func() { _ = u.builder.Signal(unix.SIGKILL) })
	defer stop()

	request, err := proto.Marshal(c.req)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	names, files := in.pack()
	if err := send(u.conn, &buildRequest{Request: request, Share: in.share, Files: names}, files); err != nil {
		return nil, u.lost(err)
	}
	var reply buildReply
	got, err := receive(u.conn, &reply, func() []string { return reply.Files })
	if err != nil {
		return nil, u.lost(err)
	}
	u.console, u.rootFD = got["console"], got["root"]
	if reply.Error != nil {
		return nil, reply.Error
	}
	// The builder leaves before the limit of processes comes, which its
	// threads would count against.
	if err := c.moveOut(u.builder.Pid); err != nil {
		return nil, err
	}
	if limit, ok := c.req.GetResources().GetUnified()["pids.max"]; ok {
		if err := c.cgroup.set(map[string]string{"pids.max": limit}); err != nil {
			return nil, err
		}
	}
	limits := &spawn.Spec{Proc: in.proc}
	setLimits(limits, c.req.GetProcess())
	if u.child, err = spawn.Adopt(reply.Pid, limits); err != nil {
		return nil, processError(err, c.req.GetProcess())
	}
	return u, nil
}

// builderCgroup is where builders go; no container's id contains "@".
const builderCgroup = "@builders"

func (c *Container) moveOut(pid int) error {
	p := filepath.Join(c.env.CgroupRoot, builderCgroup)
	if err := unix.Mkdir(p, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("cgroup: make %s: %w", p, err)
	}
	if err := writeFile(filepath.Join(p, "cgroup.procs"), fmt.Sprint(pid)); err != nil {
		return fmt.Errorf("cgroup: move builder: %w", errnoOf(err))
	}
	return nil
}

// lost explains a conversation that ended too early.
func (u *userBuild) lost(err error) error {
	_ = u.builder.Signal(unix.SIGKILL)
	if broken := outcome(u.builder.Exit().Status, u.output); broken != nil {
		return fmt.Errorf("%s: %w", InitArg, broken)
	}
	return fmt.Errorf("%s: %w", InitArg, err)
}

func (u *userBuild) start(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = u.builder.Signal(unix.SIGKILL) })
	defer stop()
	if err := send(u.conn, struct{}{}, nil); err != nil {
		return u.lost(err)
	}
	var reply startReply
	if _, err := receive(u.conn, &reply, nil); err != nil {
		return u.lost(err)
	}
	return reply.Error.asError()
}

func (u *userBuild) close() {
	if u.conn != nil {
		// The builder sees it and ends, and with it an init that waits.
		_ = u.conn.Close()
		u.conn = nil
	}
	if u.builder != nil {
		_ = u.builder.Signal(unix.SIGKILL)
		<-u.builder.Done()
		u.builder.Close()
		u.builder = nil
	}
	if u.output != nil {
		_ = u.output.Close()
		u.output = nil
	}
	if u.child != nil {
		u.child.Close()
	}
	if u.rootFD != nil {
		_ = u.rootFD.Close()
		u.rootFD = nil
	}
}

func spawnMap(list []*agentv1.IDMapping) []spawn.IDMap {
	var out []spawn.IDMap
	for _, m := range list {
		out = append(out, spawn.IDMap{Container: m.GetContainerId(), Host: m.GetHostId(), Size: m.GetSize()})
	}
	return out
}

// closeSources gives back what the other process has now.
func (in *inputs) closeSources() {
	proc := in.proc
	in.proc = nil
	in.close()
	in.proc = proc
	in.rootfs, in.resolv, in.mounts, in.nodes = nil, nil, nil, nil
}

// pack lists the descriptors that the builder needs.
func (in *inputs) pack() ([]string, []*os.File) {
	var names []string
	var files []*os.File
	add := func(name string, f *os.File) {
		if f != nil {
			names, files = append(names, name), append(files, f)
		}
	}
	add("rootfs", in.rootfs)
	add("resolv", in.resolv)
	add("stdin", in.stdio.In)
	add("stdout", in.stdio.Out)
	add("stderr", in.stdio.Err)
	for i, f := range in.mounts {
		add(fmt.Sprintf("mount %d", i), f)
	}
	for p, f := range in.nodes {
		add("node "+p, f)
	}
	for typ, f := range in.joins {
		if typ != agentv1.Namespace_TYPE_USER {
			add(fmt.Sprintf("join %d", typ), f)
		}
	}
	return names, files
}

// unpack is the other end of pack.
func (in *inputs) unpack(files map[string]*os.File) {
	in.mounts = make(map[int]*os.File)
	in.nodes = make(map[string]*os.File)
	in.joins = make(map[agentv1.Namespace_Type]*os.File)
	for name, f := range files {
		var n int
		switch {
		case name == "rootfs":
			in.rootfs = f
		case name == "resolv":
			in.resolv = f
		case name == "stdin":
			in.stdio.In = f
		case name == "stdout":
			in.stdio.Out = f
		case name == "stderr":
			in.stdio.Err = f
		case scan(name, "mount %d", &n):
			in.mounts[n] = f
		case scan(name, "join %d", &n):
			in.joins[agentv1.Namespace_Type(n)] = f
		case len(name) > 5 && name[:5] == "node ":
			in.nodes[name[5:]] = f
		}
	}
}

func scan(s, format string, n *int) bool {
	_, err := fmt.Sscanf(s, format, n)
	return err == nil
}

// RunInit is the main function of the builder. It returns the exit status.
func RunInit() int {
	// Whoever holds the container down must not see this process's memory.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	runtime.LockOSThread() // the main thread is not to be used
	done := make(chan error, 1)
	go func() { done <- runInit(os.NewFile(0, "agent")) }()
	if err := <-done; err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", InitArg, err)
		return 1
	}
	return 0
}

func runInit(conn *os.File) error {
	ctx := context.Background()
	var request buildRequest
	files, err := receive(conn, &request, func() []string { return request.Files })
	if err != nil {
		return err
	}
	in := &inputs{req: new(agentv1.CreateContainerRequest), share: request.Share, inUser: true, sibling: true}
	if err := proto.Unmarshal(request.Request, in.req); err != nil {
		return fmt.Errorf("decode request: %w", err)
	}
	in.unpack(files)
	if in.proc, err = openProc(); err != nil {
		return err
	}
	l, err := buildLocal(ctx, in)
	if err != nil {
		return send(conn, &buildReply{Error: toRemote(err)}, nil)
	}
	defer l.close()
	reply := &buildReply{Pid: l.child.Pid, Files: []string{"root"}}
	out := []*os.File{l.rootFD}
	if l.console != nil {
		reply.Files, out = append(reply.Files, "console"), append(out, l.console)
	}
	err = send(conn, reply, out)
	if l.console != nil {
		_ = l.console.Close()
	}
	// Streams that this process keeps would never end for their readers.
	for _, f := range []*os.File{in.stdio.In, in.stdio.Out, in.stdio.Err} {
		if f != nil {
			_ = f.Close()
		}
	}
	if err != nil {
		return err
	}
	var start struct{}
	if _, err := receive(conn, &start, nil); err != nil {
		if errors.Is(err, io.EOF) {
			return nil // the container is not to be started
		}
		return err
	}
	return send(conn, &startReply{Error: toRemote(l.start(ctx))}, nil)
}

func socketPair() (*os.File, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "builder"), os.NewFile(uintptr(fds[1]), "agent"), nil
}

// send writes one message.
func send(conn *os.File, v any, files []*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(body) > maxMessage {
		return fmt.Errorf("message has %d bytes, at most %d are allowed", len(body), maxMessage)
	}
	b := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	for len(b) > 0 {
		n, err := unix.SendmsgN(int(conn.Fd()), b, nil, nil, unix.MSG_NOSIGNAL)
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return fmt.Errorf("send message: %w", err)
		}
		b = b[n:]
	}
	for len(files) > 0 {
		n := min(len(files), fdsPerWrite)
		var fds []int
		for _, f := range files[:n] {
			fds = append(fds, int(f.Fd()))
		}
		_, err := unix.SendmsgN(int(conn.Fd()), []byte{0}, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("send descriptors: %w", err)
		}
		files = files[n:]
	}
	return nil
}

// receive reads one message and the descriptors whose names it lists.
func receive(conn *os.File, v any, names func() []string) (_ map[string]*os.File, err error) {
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, fmt.Errorf("receive message: %w", err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxMessage {
		return nil, fmt.Errorf("message has %d bytes, at most %d are allowed", n, maxMessage)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(conn, body); err != nil {
		return nil, fmt.Errorf("receive message: %w", err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return nil, fmt.Errorf("decode message: %w", err)
	}
	if names == nil {
		return nil, nil
	}
	files := make(map[string]*os.File)
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
		}
	}()
	want := names()
	for len(want) > 0 {
		oob := make([]byte, unix.CmsgSpace(4*fdsPerWrite))
		n, oobn, _, _, err := unix.Recvmsg(int(conn.Fd()), make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("receive descriptors: %w", err)
		}
		if n == 0 {
			return nil, fmt.Errorf("receive descriptors: %w", io.ErrUnexpectedEOF)
		}
		fds, err := rights(oob[:oobn])
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			if len(want) == 0 {
				_ = unix.Close(fd)
				return nil, errors.New("more descriptors than announced")
			}
			files[want[0]] = os.NewFile(uintptr(fd), want[0])
			want = want[1:]
		}
	}
	return files, nil
}

func rights(oob []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive descriptors: %w", err)
	}
	var out []int
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return nil, fmt.Errorf("receive descriptors: %w", err)
		}
		out = append(out, fds...)
	}
	return out, nil
}
