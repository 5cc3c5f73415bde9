package supervisor

import (
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hyperhq/runv/state"
)

// lifecycle is the state of one container. An event that a state does not list
// is refused with the message that the person at the command line reads:
//
//	          built    start    pause    resume   exit
//	creating  created  ✗        ✗        ✗        stopped
//	created   ✗        running  ✗        ✗        stopped
//	running   ✗        ✗        paused   ✗        stopped
//	paused    ✗        ✗        ✗        running  stopped
//	stopped   ✗        ✗        ✗        ✗        ✗
type lifecycle uint8

const (
	creating lifecycle = iota
	created
	running
	paused
	stopped
	numLifecycles
)

func (l lifecycle) String() string { return string(l.status()) }

// status is how the record on disk spells the state.
func (l lifecycle) status() state.Status {
	switch l {
	case creating:
		return state.Creating
	case created:
		return state.Created
	case running:
		return state.Running
	case paused:
		return state.Paused
	default:
		return state.Stopped
	}
}

// event is what can happen to a container.
type event uint8

const (
	evBuilt  event = iota // the guest has built it
	evStart               // its program was executed
	evPause               // it was frozen
	evResume              // it was thawed
	evExit                // its init process has ended
	numEvents
)

func (e event) String() string {
	return [numEvents]string{"built", "start", "pause", "resume", "exit"}[e]
}

var transitions = map[lifecycle]map[event]lifecycle{
	creating: {evBuilt: created, evExit: stopped},
	created:  {evStart: running, evExit: stopped},
	running:  {evPause: paused, evExit: stopped},
	paused:   {evResume: running, evExit: stopped},
	stopped:  {},
}

// next is the state after an event, or the reason why it cannot happen.
func (l lifecycle) next(e event) (lifecycle, error) {
	if n, ok := transitions[l][e]; ok {
		return n, nil
	}
	msg := fmt.Sprintf("cannot %s a container in the %s state", e, l)
	switch {
	case e == evStart && l == running:
		msg = "cannot start an already running container"
	case e == evStart && l == stopped:
		msg = "cannot start a container that has stopped"
	case e == evPause:
		msg = "container not running"
	case e == evResume:
		msg = "container not paused"
	}
	return l, status.Error(codes.FailedPrecondition, msg)
}
